"""What the clouds' machines have and cost.

List prices in US dollars an hour, on demand, Linux, of us-east-1 and us-central1 as of late 2025; other regions cost
up to a third more, spot machines about a third of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Instance:
    """A machine type.

    Attributes:
        cpus: virtual CPUs.
        memory_gib: of host memory.
        gpus: number of GPUs.
        gpu: Ray's name of their kind; "" without GPUs.
        price: US dollars an hour; None where it is not known.
    """

    cpus: int
    memory_gib: int
    gpus: int = 0
    gpu: str = ""
    price: float | None = None


Cloud = Literal["aws", "gcp"]

INSTANCES: dict[Cloud, dict[str, Instance]] = {
    "aws": {
        "m7i.large": Instance(2, 8, price=0.1008),
        "m7i.xlarge": Instance(4, 16, price=0.2016),
        "m7i.2xlarge": Instance(8, 32, price=0.4032),
        "g4dn.xlarge": Instance(4, 16, 1, "T4", 0.526),
        "g4dn.12xlarge": Instance(48, 192, 4, "T4", 3.912),
        "g5.xlarge": Instance(4, 16, 1, "A10G", 1.006),
        "g5.2xlarge": Instance(8, 32, 1, "A10G", 1.212),
        "g5.12xlarge": Instance(48, 192, 4, "A10G", 5.672),
        "g5.48xlarge": Instance(192, 768, 8, "A10G", 16.288),
        "g6.xlarge": Instance(4, 16, 1, "L4", 0.8048),
        "g6.2xlarge": Instance(8, 32, 1, "L4", 0.9776),
        "g6.12xlarge": Instance(48, 192, 4, "L4", 4.6016),
        "g6.48xlarge": Instance(192, 768, 8, "L4", 13.3504),
        "g6e.xlarge": Instance(4, 32, 1, "L40S", 1.861),
        "g6e.2xlarge": Instance(8, 64, 1, "L40S", 2.24208),
        "g6e.12xlarge": Instance(48, 384, 4, "L40S", 10.49264),
        "g6e.48xlarge": Instance(192, 1536, 8, "L40S", 30.13118),
        "p4d.24xlarge": Instance(96, 1152, 8, "A100", 21.957),
        "p4de.24xlarge": Instance(96, 1152, 8, "A100-80G", 27.447),
        "p5.48xlarge": Instance(192, 2048, 8, "H100", 55.04),
        "p5en.48xlarge": Instance(192, 2048, 8, "H200", 63.296),
    },
    "gcp": {
        "n2-standard-4": Instance(4, 16, price=0.1942),
        "n2-standard-8": Instance(8, 32, price=0.3885),
        "e2-standard-4": Instance(4, 16, price=0.134),
        "g2-standard-4": Instance(4, 16, 1, "L4", 0.7068),
        "g2-standard-8": Instance(8, 32, 1, "L4", 0.8536),
        "g2-standard-12": Instance(12, 48, 1, "L4", 1.0005),
        "g2-standard-24": Instance(24, 96, 2, "L4", 2.0011),
        "g2-standard-48": Instance(48, 192, 4, "L4", 4.0021),
        "g2-standard-96": Instance(96, 384, 8, "L4", 8.0042),
        "a2-highgpu-1g": Instance(12, 85, 1, "A100", 3.6735),
        "a2-highgpu-8g": Instance(96, 680, 8, "A100", 29.3878),
        "a2-ultragpu-1g": Instance(12, 170, 1, "A100-80G", 5.0688),
        "a2-ultragpu-8g": Instance(96, 1360, 8, "A100-80G", 40.5504),
        "a3-highgpu-8g": Instance(208, 1872, 8, "H100", 88.4902),
    },
}
