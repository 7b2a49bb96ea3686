from hpsched import CyclePruner, OneCycleSampler, best, confirm, suggest_onecycle

__all__ = ["CyclePruner", "OneCycleSampler", "best", "confirm", "suggest_onecycle"]
