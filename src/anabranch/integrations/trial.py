"""A call of a layer tried aside: `auto` lets its leading candidates run before it keeps one.

Shape suffixes: S tokens of this rank, K experts a token, D hidden size.
"""

import torch

from anabranch.experts.adaptive import AdaptiveExperts, Call
from anabranch.integrations.measure import aside, slowest_ms
from anabranch.placement.choice import Choice


class LayerTrial:
    """Times forward and backward of one call, with its own rows, routing and weights, under any choice.

    Gradients are dropped, and nothing of the training around it changes (`aside`). Every rank tries the same.
    """

    def __init__(self, layer: AdaptiveExperts, call: Call) -> None:
        self.layer, self.call = layer, call

    def __call__(self, choice: Choice) -> float:
        """ms on the slowest rank. Collective."""
        home = [p.detach().requires_grad_() for p in self.call.home]
        x_SD, weights_SK = (t.detach().requires_grad_() for t in (self.call.x_SD, self.call.weights_SK))

        def once() -> None:
            prepared = self.layer.prepare(choice.plan, choice.exchange, self.call.ids_SK)
            y_SD = self.layer.run(home, x_SD, weights_SK, prepared)
            torch.autograd.grad(y_SD, [x_SD, weights_SK, *home], torch.ones_like(y_SD), allow_unused=True)

        with aside(x_SD.device):
            return slowest_ms(once, self.layer.group, x_SD.device)
