"""The machine's own rate: the matrix products that a pass needs and nothing else, at the model's shapes.

Forward, the gradient of what went in, and of the matrix itself where it is trained; those of an adapter are too small
to tell. Each matrix has memory of its own, as in the model.
"""

from __future__ import annotations

from tests.bench import protocol

if __name__ == "__main__":
    protocol.own_stdout()

    import torch

    from raytune_ds.config import ModelConfig
    from raytune_ds.model.load import skeleton
    from tests.bench.peers.case import told

    case, passes = told(), protocol.Passes()
    torch.set_num_threads(case.threads)
    dtype, trains_all = getattr(torch, case.dtype), case.lora is None
    model = skeleton(ModelConfig(name=case.model))
    config, head = model.config, model.get_output_embeddings().weight
    rows = case.rows()
    tokens = sum(len(row["input_ids"]) - 1 for row in rows)
    targets = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    at_once = min(tokens, case.options.get("tokens", 2048))

    class Product:
        """One matrix, or one of each expert, in float32 unless the case computes in less."""

        def __init__(self, parameter: torch.Tensor, count: int) -> None:
            experts, (out, into) = parameter.shape[:-2], parameter.shape[-2:]
            share = config.num_experts_per_tok / experts[0] if experts else 1
            self.rows = round(count * share)
            self.flops = 2 * self.rows * parameter.numel() * (3 if trains_all else 2)
            self.weight = torch.randn(*experts, out, into, dtype=dtype)
            self.into = torch.randn(*experts, self.rows, into, dtype=dtype)
            self.back = torch.randn(*experts, self.rows, out, dtype=dtype)

        def __call__(self) -> None:
            self.into @ self.weight.mT
            self.back @ self.weight
            if trains_all:
                self.back.mT @ self.into

    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding and p is not head]
    products = [Product(p, at_once) for p in matrices]
    last = Product(head, min(1024, targets))
    while True:
        passes.begin()
        done = 0
        for _ in range(round(tokens / at_once)):
            for product in products:
                product()
                done += product.flops
        for _ in range(round(targets / last.rows)):
            last()
            done += last.flops
        passes.end(0.0, flops=done)
