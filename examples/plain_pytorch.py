"""SURELoss in a plain PyTorch loop: `python examples/plain_pytorch.py`. Any network, any images, any optimiser."""

import torch

import sure_kernels as sk

torch.manual_seed(0)
image = torch.randn(2, 1, 16, 16, 16)  # (N, M, *spatial)
target = (image[:, 0] > 0.5).long() + (image[:, 0] > 1).long()  # labels (N, *spatial)

network = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 3, 1))
loss = sk.SURELoss(
    num_epochs=10,
    good_model_step=3,
    annealing_steps=2,
    supervision="correlation",  # the form of `sure train`, docs/supervision.md
    margin=0.3,
    gradient_weight=3,
    far_weight=20,
)
optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
for epoch in range(10):
    loss.set_epoch(epoch)
    optimizer.zero_grad()
    value = loss(network(image), target, image=image)
    value.backward()
    optimizer.step()
    print(f"epoch {epoch}: loss {value.item():.3f}")

maps = sk.dirichlet_uncertainty(network(image).detach(), measures=("probability", "vacuity"))
print(f"mean vacuity {maps.vacuity.mean():.3f}")
