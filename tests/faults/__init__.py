"""Faults injected into real workers and real databases, and the account of what was left.

``python -m tests.faults --help`` lists them; tests/integration/test_faults.py runs short forms.
"""
