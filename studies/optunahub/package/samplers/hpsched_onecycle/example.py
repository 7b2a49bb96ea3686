import optuna
import optunahub
import torch
import torch.nn.functional as F

package = optunahub.load_module(package="samplers/hpsched_onecycle")

torch.manual_seed(0)
x = torch.randn(1000, 20)
y = (x @ torch.randn(20, 4)).argmax(1)
train_set = torch.utils.data.TensorDataset(x[:800], y[:800])
loader = torch.utils.data.DataLoader(train_set, batch_size=32, shuffle=True)


def train(cycle):
    torch.manual_seed(cycle.seed)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=cycle.max_lr,
        momentum=cycle.max_momentum,
        weight_decay=cycle.weight_decay,
    )
    schedule = cycle.schedule(optimizer)
    for inputs, targets in cycle.batches(loader):
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss)
    return (model(x[800:]).argmax(1) != y[800:]).float().mean().item()


def objective(trial):
    return package.suggest_onecycle(trial, total_steps=300).run(train)


study = optuna.create_study(sampler=package.OneCycleSampler(), pruner=package.CyclePruner())
study.optimize(objective, n_trials=6)
package.confirm(study, top=1, seeds=2)
study.optimize(objective, n_trials=2)
best = package.best(study)
print(best.params, best.mean, best.spread, best.seeds)
