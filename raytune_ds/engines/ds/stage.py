"""ZeRO's stage and what is offloaded where, from the file and from `engine.*`."""

from __future__ import annotations

from raytune_ds.aliases import ABSENT, close
from raytune_ds.engines.ds.keys import AUTO, ZERO
from raytune_ds.engines.ds.work import Work

DEFAULT_STAGE = 2
_DEVICES = ("none", "cpu")
_WANTS = {  # engine.offload: whether the optimizer and the parameters are offloaded
    "none": {"offload_optimizer": False, "offload_param": False},
    "optimizer": {"offload_optimizer": True, "offload_param": False},
    "parameters": {"offload_optimizer": True, "offload_param": True},
}


def zero(work: Work) -> None:
    """Stage and offloads, from the file and from engine.*, which must not contradict each other."""
    stage = _stage(work)
    devices = {part: _device(work, part, stage) for part in ("offload_optimizer", "offload_param")}
    for part, device in devices.items():
        _offload(work, f"{ZERO}.{part}", device)
    if stage > 1 and work.facts.bf16:
        # Contributions that bfloat16 would round away; ddp and fsdp sum in float32 too.
        for key in ("data_types.grad_accum_dtype", "communication_data_type"):
            if work.told(key) is None:
                work.put(key, "fp32")
    in_fp32 = work.get("data_types.grad_accum_dtype") == "fp32"
    if stage == 1 and in_fp32 and work.facts.bf16 and devices["offload_optimizer"] == "none":
        work.problem(
            "data_types.grad_accum_dtype",
            ": with stage 1 and bfloat16 DeepSpeed takes another optimizer for that, which checkpoints can't read; "
            "set the stage to 2, or leave it out",
        )
    if work.get("zero_force_ds_cpu_optimizer") is True and devices["offload_optimizer"] != "none":
        work.note(
            f"{work.said('zero_force_ds_cpu_optimizer')}: the engine brings its own AdamW, so DeepSpeed is told false"
        )


def _stage(work: Work) -> int:
    key, ours = f"{ZERO}.stage", work.facts.engine.stage
    given = work.told(key)
    if given is not None and given not in (1, 2, 3):
        off = "is no ZeRO; take engine.kind=ddp, or write 1, 2 or 3"
        work.problem(key, f": {off if given == 0 else 'must be 1, 2 or 3'}")
        given = None
    if given is not None and ours is not None and given != ours:
        work.problem(key, f", engine.stage = {ours} in the config: leave one of them out, or make them equal")
    stage = int(given or ours or DEFAULT_STAGE)
    if work.is_file and work.get(ZERO) and work.get(key) is None and ours is None:
        work.note(f"{ZERO} in {work.file} names no stage; it is {DEFAULT_STAGE}")
    work.put(key, stage)
    return stage


def _device(work: Work, part: str, stage: int) -> str:
    """Where optimizer or parameters go: none or cpu."""
    key, engine = f"{ZERO}.{part}.device", work.facts.engine
    given = _given_device(work, f"{ZERO}.{part}")
    wanted = None if engine.offload is None else _WANTS[engine.offload][part]
    if given is not None and wanted is not None and (given != "none") != wanted:
        work.problem(
            key,
            f", engine.offload = {engine.offload} in the config: leave one of them out, or make them agree",
        )
    device = given or ("cpu" if wanted else "none")
    if stage < 3 and device != "none" and part == "offload_param":
        named = work.said(key, given) if given else f"engine.offload = {engine.offload} in the config"
        work.problems.append(
            f"{named}: parameters are sharded, and so offloaded, in ZeRO stage 3 only, and the stage is {stage}; "
            "set it to 3"
        )
    return device


def _given_device(work: Work, section: str) -> str | None:
    """The device that the file names; None: it names none."""
    given = work.told(f"{section}.device")
    if given is None:
        if work.is_file and work.get(section) and work.get(f"{section}.device") is None:
            work.note(f"{section} in {work.file} names no device, so engine.offload alone decides")
        return None
    device = str(given).strip().lower()
    if device in _DEVICES:
        return device
    near = close(device, _DEVICES, 0.6)
    hint = f"did you mean {near[0]}?" if near else "write none or cpu"
    why = ABSENT["nvme_path"] if device == "nvme" else f"there is no such device; {hint}"
    work.problem(f"{section}.device", f": {why}")
    return None


def _offload(work: Work, section: str, device: str) -> None:
    """The section as DeepSpeed gets it; none where nothing is offloaded."""
    if device == "none":
        work.pop(section)
        return
    is_made = work.get(section) is None
    work.put(f"{section}.device", device)
    work.pop(f"{section}.nvme_path")
    gpu, pin = work.facts.gpu, f"{section}.pin_memory"
    if gpu is False:  # only CUDA can pin
        work.put(pin, False)
    elif is_made or work.get(pin) == AUTO:
        work.put(pin, bool(gpu))
