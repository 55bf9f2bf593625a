"""The cluster section of the config tree: the machines that `raytune-ds render` describes."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from raytune_ds.section import SECRET_NAME, Count, Section, Text

Whole = Annotated[int, Field(ge=0)]
SHARED_DIR = "/shared"


class AwsConfig(Section):
    """Machines on AWS, for `ray up`."""

    region: Text = Field(default="us-east-1", description="Region. us-east-1: most GPU types, lowest prices.")
    instance_type: Text = Field(
        default="g6e.2xlarge",
        description="Instance of a GPU node. g6e.2xlarge: one L40S with 48 GB, enough for LoRA on 7B models.",
    )
    head_instance_type: Text = Field(
        default="m7i.xlarge", description="Instance of the head node, which trains nothing."
    )
    machine_image: Text = Field(
        default="ami-0123456789abcdef0",
        description="AMI of all nodes: Ubuntu with Docker, NVIDIA's driver and its container toolkit. The default "
        "stands for yours; the file says how to look it up.",
    )
    disk_gib: Count = Field(
        default=200, description="Disk of a node in GiB: the image, a model of the hub, DeepSpeed's builds."
    )
    file_system: Text | None = Field(
        default="fs-0123456789abcdef0",
        description="EFS file system that is mounted at cluster.shared_dir; the default stands for yours. null: none; "
        "run.storage must then be s3://.",
    )
    instance_profile: Text | None = Field(
        default=None,
        description="Name of the IAM instance profile of all nodes. It must let them read run.storage on s3:// and let "
        "the head control EC2 and pass the role on. null: Ray makes one for the head, and GPU nodes have none.",
    )


class GcpConfig(Section):
    """Machines on Google Cloud, for `ray up`."""

    project: Text = Field(default="my-project", description="Project id; the default stands for yours.")
    zone: Text = Field(
        default="us-central1-a",
        description="Zone, in a region that offers the machine type of the GPU nodes.",
    )
    machine_type: Text = Field(
        default="g2-standard-8",
        description="Machine of a GPU node; its GPUs come with it. g2-standard-8: one L4 with 24 GB.",
    )
    head_machine_type: Text = Field(
        default="n2-standard-4", description="Machine of the head node, which trains nothing."
    )
    machine_image: Text = Field(
        default="projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2204-nvidia-580",
        description="Disk image of all nodes: Ubuntu with Docker, NVIDIA's driver and its container toolkit, such as "
        "Google's deep learning images.",
    )
    disk_gib: Count = Field(
        default=200, description="Disk of a node in GiB: the image, a model of the hub, DeepSpeed's builds."
    )
    file_share: Text | None = Field(
        default="10.0.0.2:/shared",
        description="Filestore share (address:/name) that is mounted at cluster.shared_dir; the default stands for "
        "yours. null: none; run.storage must then be gs://.",
    )


class OnpremConfig(Section):
    """Machines of one's own that answer SSH, for `ray up`."""

    head: Text = Field(
        default="10.0.0.10", description="Address of the head node, as SSH and the other nodes reach it."
    )
    workers: tuple[Text, ...] = Field(
        default=("10.0.0.11", "10.0.0.12"),
        description="Addresses of the GPU nodes, as the head node reaches them.",
    )
    ssh_user: Text = Field(
        default="ubuntu",
        description="User that SSH logs in as; docker must be open to it, and its id be 1000, as in the image.",
    )
    ssh_key: Text = Field(
        default="~/.ssh/id_ed25519",
        description="File with the private key of that user, on the machine that runs `ray up`.",
    )
    docker: bool = Field(
        default=True,
        description="Run Ray in cluster.image. false: in the Python that is on the nodes' PATH, raytune_ds installed.",
    )


class KubernetesConfig(Section):
    """Where KubeRay puts things."""

    namespace: Text = Field(
        default="raytune-ds", description="Namespace of everything; it must be there already."
    )
    claim: Text | None = Field(
        default="raytune-ds-shared",
        description="PersistentVolumeClaim (ReadWriteMany) that is mounted at cluster.shared_dir. null: none; "
        "run.storage must then be s3:// or gs://, opened by the service account.",
    )
    service_account: Text | None = Field(
        default=None,
        description="Service account of the pods, bound to a cloud role that reads buckets; it must be there already. "
        "null: the namespace's own.",
    )
    env_from: Text | None = Field(
        default="raytune-ds-env",
        description="Secret whose entries become environment variables of the pods (HF_TOKEN, WANDB_API_KEY, "
        "REDIS_PASSWORD ...); it may be missing. null: none.",
    )
    redis: Annotated[str, Field(pattern=r"^(own|[^:\s]+:\d+)$")] | None = Field(
        default="own",
        description="Redis that keeps the cluster's state, so that the head may die. own: a small one in the file; "
        "an address (host:port): that one; null: none.",
    )
    queue: Text | None = Field(
        default=None, description="Kueue LocalQueue that admits all pods of a run at once. null: no Kueue."
    )
    shm_gib: Count = Field(
        default=16,
        description="Shared memory of a GPU pod in GiB, for Ray's object store and NCCL; it is part of the pod's "
        "memory.",
    )
    gpu_resource: Text = Field(
        default="nvidia.com/gpu", description="Resource and taint by which the device plugin offers GPUs."
    )


class SlurmConfig(Section):
    """How Slurm is asked."""

    partition: Text | None = Field(
        default=None, description="Partition that has the GPU nodes. null: the cluster's default."
    )
    account: Text | None = Field(
        default=None, description="Account that is charged. null: the user's default."
    )
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")] = Field(
        default="24:00:00", description="Wall time, [days-]hours:minutes:seconds; the run resumes after it."
    )
    activate: Text | None = Field(
        default="source ~/raytune_ds/.venv/bin/activate",
        description="Shell line that puts Python with raytune_ds on the PATH of a node. null: it is there.",
    )

    @field_validator("activate")
    @classmethod
    def _without_secrets(cls, line: str | None) -> str | None:
        if any(SECRET_NAME.search(name) for name in re.findall(r"(\w+)=", line or "")):
            raise ValueError(
                "sets a secret, which would be written to files; set it where sbatch is run instead"
            )
        return line


class ClusterConfig(Section):
    """The machines a run is given, which `raytune-ds render` writes into the files of a cluster."""

    image: Text = Field(
        default="raytune-ds:cuda",
        description="Container image of all nodes, in a registry they can pull from. `make image` builds it.",
    )
    max_nodes: Count | Literal["auto"] = Field(
        default="auto",
        description="GPU nodes at most. auto: as many as scaling.num_workers fills, two where that is auto.",
    )
    min_nodes: Whole = Field(
        default=0, description="GPU nodes that stay when nothing runs. 0: what is idle costs nothing."
    )
    gpus_per_node: Whole | Literal["auto"] = Field(
        default="auto",
        description="GPUs of a node (a number). auto: what the cloud's instance has; elsewhere 1.",
    )
    cpus_per_node: Count | Literal["auto"] = Field(
        default="auto",
        description="CPUs of a node (a number). auto: what the cloud's instance has; elsewhere 8.",
    )
    memory_gib_per_node: Count | Literal["auto"] = Field(
        default="auto",
        description="Host memory of a node in GiB. auto: what the cloud's instance has; elsewhere 64.",
    )
    spot: bool = Field(
        default=True,
        description="Take spot machines first, at a third of the price, and on-demand ones where there are none. A "
        "lost node costs the steps since the last checkpoint.",
    )
    idle_timeout_minutes: Count = Field(
        default=10, description="Minutes after which an idle GPU node is given back."
    )
    shared_dir: Annotated[str, Field(pattern=r"^/[^:\s]+$")] = Field(
        default=SHARED_DIR,
        description="Directory on every node that holds the shared file system, where the target has one.",
    )
    pass_env: tuple[Text, ...] = Field(
        default=("HF_TOKEN", "WANDB_API_KEY"),
        description="Names of environment variables that are handed on to the nodes; their values are never written.",
    )
    aws: AwsConfig = Field(default=AwsConfig(), description="Machines on AWS, brought up by `ray up`.")
    gcp: GcpConfig = Field(
        default=GcpConfig(), description="Machines on Google Cloud, brought up by `ray up`."
    )
    onprem: OnpremConfig = Field(
        default=OnpremConfig(), description="Machines of one's own, brought up by `ray up`."
    )
    kubernetes: KubernetesConfig = Field(
        default=KubernetesConfig(), description="Pods on Kubernetes, brought up by KubeRay."
    )
    slurm: SlurmConfig = Field(default=SlurmConfig(), description="Nodes that a Slurm job is given.")

    @field_validator("pass_env")
    @classmethod
    def _names_only(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in names if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]:
            raise ValueError(
                f"takes names of environment variables, not values; {len(wrong)} of them "
                f"{'is' if len(wrong) == 1 else 'are'} no name"
            )
        return names
