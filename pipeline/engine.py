"""DeepSpeed and torch.distributed, and nothing else imports them.

`Ranks` is the group of processes; `TaskEngine` trains one task's tensors under ZeRO 0 to 3 and reads and writes
them wherever ZeRO keeps them. Traps named here were measured with deepspeed 0.19.8.
"""

from __future__ import annotations

import gc
import os
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "warning")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.deepspeed_config import deepspeed_config
from pipeline.heartbeat import Heartbeat
from pipeline.hooks import hook_ids, only_hooks
from pipeline.optimizer_groups import ParameterGroup, optimizer_groups
from pipeline.peak_memory import peak_resident_bytes
from pipeline.recipe import Engine, Training
from pipeline.recipe_source import ROOT
from pipeline.stopping import Stopped, StopRequest

Value = TypeVar("Value")


class Ranks:
    """The processes of this run and what they tell each other. All is collective but `first` and `fail`."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank = rank
        self.world = world
        self.device = device
        self._heartbeat: Heartbeat | None = None

    @classmethod
    def start(cls, *, timeout_minutes: float = 60) -> Ranks:
        """Join the group named by the launcher's environment; without one, this process is the only rank."""
        if "RANK" not in os.environ:
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(alone, MASTER_PORT=str(_free_port()))
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
        deepspeed_logger.setLevel("WARNING")
        accelerator = get_accelerator()
        on_cpu = accelerator.device_name() == "cpu"
        if on_cpu:
            # Else starting compiles an op that training does not need; a run killed meanwhile leaves a lock on
            # which every later run hangs silently.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        else:
            accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            deepspeed.init_distributed(
                dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(minutes=timeout_minutes),
            )
        except dist.DistNetworkError as error:
            raise UserError(
                f"MASTER_ADDR:MASTER_PORT {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: the ranks "
                f"cannot meet there ({str(error).splitlines()[0]}); if another run uses the port, give the launcher "
                "another: deepspeed --master_port=29501 ..."
            ) from error
        device = torch.device("cpu" if on_cpu else accelerator.current_device_name())
        ranks = cls(dist.get_rank(), dist.get_world_size(), device)
        ranks._watch_hosts()
        return ranks

    def _watch_hosts(self) -> None:
        hosts = self.gather(platform.node())
        if len(set(hosts)) == 1:
            return  # one launcher started all of them, and notices the end of each
        address = os.environ["MASTER_ADDR"]
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if self.first else None
        port: int = self.gather(store.port if store else 0)[0]
        self._heartbeat = Heartbeat(store or dist.TCPStore(address, port, is_master=False), self.rank, hosts)

    def part(self) -> None:
        """Wait for all ranks at the end of the run; from then on each may leave."""
        dist.barrier()
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def fail(self) -> None:
        """Let the other hosts know that this rank leaves for a fault: they need not come back. Not collective."""
        if self._heartbeat is not None:
            self._heartbeat.fail()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on `tensor`'s device."""
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank; shapes and dtypes must agree."""
        shared = tensor.detach().to(self.device, copy=True)
        dist.broadcast(shared, src=0)
        return shared.to(tensor.device)

    def gather(self, value: Value) -> list[Value]:
        """Every rank's picklable value, by rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], Value]) -> Value:
        """Run `action`, which communicates with nobody, on every rank; a `UserError` of any is raised on all."""
        error: str | None = None
        try:
            value = action()
        except UserError as fault:
            error = str(fault)
        for rank, fault_there in enumerate(self.gather(error)):
            if fault_there is not None:
                raise UserError(fault_there if rank == 0 else f"on rank {rank}: {fault_there}")
        return value

    def peak_memory(self) -> int:
        """Most bytes on any rank since the last call: allocated on a GPU; without one, of the process. Collective."""
        if self.device.type == "cpu":
            mine = peak_resident_bytes()
        else:
            mine = get_accelerator().max_memory_allocated()
            get_accelerator().reset_peak_memory_stats()
        return max(self.gather(mine))

    def check_stop(self, stop: StopRequest) -> None:
        """Raise `Stopped` on every rank when any was told to stop."""
        for reason in self.gather(stop.reason()):
            if reason is not None:
                raise Stopped(reason)

    def on_first(self, action: Callable[[], Value]) -> Value:
        """Run `action` on rank 0 and give its result to all; its `UserError` is raised on all."""
        if self.world == 1:  # a stage's tensors need no pickling for nobody
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        result: Value = outcome[0]
        return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TaskEngine:
    """One task's optimizer under DeepSpeed: forward, backward, step, and the trained tensors in float32."""

    def __init__(
        self,
        model: nn.Module,
        settings: Engine,
        training: Training,
        ranks: Ranks,
        groups: Sequence[ParameterGroup] = (),
    ) -> None:
        """`groups`: trained tensors with settings of their own."""
        self._stage = settings.zero
        self._world = ranks.world
        self._norm: Tensor | None = None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = None  # what `run_rows` left there is no part of the first step
        assert trained, "a task without trainable tensors never starts an engine"
        assert all(parameter.numel() for parameter in trained), "ZeRO 3 cannot hold empty parameters"
        self._optimizer = _optimizer(training)(
            optimizer_groups(trained, groups, training), lr=training.learning_rate, eps=training.adam_eps
        )
        config = deepspeed_config(settings, training, ranks.world)
        if settings.zero:
            # DeepSpeed's default, 5e8 numbers, takes up to 4 GB in every backward, however few are trained.
            zero = config["zero_optimization"]
            count = sum(parameter.numel() for parameter in trained)
            zero["reduce_bucket_size"] = min(count, int(zero.get("reduce_bucket_size", count)))
        if settings.zero == 3:  # penalties and end-of-task work read trained tensors outside their modules' forwards
            zero = config["zero_optimization"]
            key = "stage3_param_persistence_threshold"
            zero[key] = max(int(zero.get(key, 0)), 1 + max(parameter.numel() for parameter in trained))
        if settings.offload == "parameters" and all(map(torch.is_floating_point, model.parameters())):
            # Else DeepSpeed would first move the whole model to the device: so it takes tensor after tensor.
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(ranks.device)
        foreign_hooks = hook_ids(model)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=config,
        )
        if settings.zero == 3:
            # While DeepSpeed learns the order of modules, in a first forward and wherever that order changes, it
            # releases persistent tensors too, and a penalty after the forward would read nothing; it leaves these.
            for parameter in trained:
                parameter.is_external_param = True  # type: ignore[attr-defined]
        self._own_hooks = hook_ids(model) - foreign_hooks
        if settings.zero in (1, 2) and len(self._optimizer.param_groups) > 1 and training.optimizer == "adamw":
            self._make_moments()

    def _make_moments(self) -> None:
        """Zero moments, as AdamW makes them in its first step.

        DeepSpeed links them to the trained tensors right after the first group's step, when the other groups have
        none yet, and never again: their moments would be out of reach.
        """
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                moments = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[flat] = {"step": torch.tensor(0.0), **moments}

    @property
    def module(self) -> nn.Module:
        """The model as DeepSpeed runs it: calling it gathers what ZeRO 3 has scattered."""
        module: nn.Module = self._engine.module
        return module

    @property
    def forwards_together(self) -> bool:
        """Whether every rank must run as many forwards as the others: ZeRO 3 gathers weights as they go."""
        return self._stage == 3

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """One micro-batch's forward."""
        loss: Tensor = self._engine(**batch)
        return loss

    def idle_forward(self, batch: Mapping[str, Tensor]) -> None:
        """A forward for the other ranks' sake: no hook but DeepSpeed's own sees it."""
        with only_hooks(self.module, self._own_hooks), torch.no_grad():
            self.module(**batch)

    def backward(self, loss: Tensor) -> None:
        """One micro-batch's backward; DeepSpeed divides by the micro-batches of this rank and averages ranks."""
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """Advance by one micro-batch; the optimizer steps on the last one of a global batch."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"]]
            self._norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        self._engine.step()

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """The global gradient's norm before clipping, of the last step, as it lies on the device."""
        if self._stage == 0:  # which in fp32 clips without keeping the norm
            return self._norm
        norm: Tensor | float | None = self._engine.get_global_grad_norm()
        return norm

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The averaged gradient of the global batch, between the last backward and the step. Collective."""
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, "gradients are readable between the last backward and the step only"
        whole: Tensor = gradient.detach().float()
        return whole

    def first_moment(self, parameter: nn.Parameter) -> Tensor:
        """Adam's `exp_avg`, whole, float32, wherever ZeRO keeps it. Collective."""
        return self._moment(parameter, "exp_avg")

    def second_moment(self, parameter: nn.Parameter) -> Tensor:
        """Adam's `exp_avg_sq`, whole, float32. Collective."""
        return self._moment(parameter, "exp_avg_sq")

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self._stage == 0:
            moment = self._optimizer.state[parameter][key]
        else:
            moment = safe_get_full_optimizer_state(parameter, key)
        assert moment is not None, "moments exist after the first step only"
        whole: Tensor = moment.detach().float().reshape(_full_shape(parameter))
        return whole

    def write_moments(self, parameter: nn.Parameter, first: Tensor, second: Tensor) -> None:
        """Set both of Adam's moments of a trained tensor. Collective."""
        for key, value in (("exp_avg", first), ("exp_avg_sq", second)):
            value = value.to(self._engine.device, torch.float32)
            if self._stage == 0:
                self._optimizer.state[parameter][key].copy_(value)
            elif self._stage < 3:
                safe_set_full_optimizer_state(parameter, value, key)
            else:
                safe_set_local_optimizer_state(parameter, self._shard(parameter, value), key)

    def restart_group(self, name: str) -> None:
        """Let Adam's step count of the group `name` begin anew: its bias corrections belong to empty moments."""
        for flat in self._flat_tensors(name):
            self._optimizer.state[flat]["step"].zero_()

    def _flat_tensors(self, name: str) -> list[Tensor]:
        """What the optimizer holds of a group: its tensors, or this rank's flat pieces of them."""
        index = next(i for i, group in enumerate(self._optimizer.param_groups) if group.get("name") == name)
        if self._stage < 3:
            return list(self._optimizer.param_groups[index]["params"])
        zero: Any = self._engine.optimizer  # whose pieces stand in the client's groups during a step only
        pieces = zip(zero.fp32_partitioned_groups_flat, zero.sub_group_to_group_id.values(), strict=True)
        return [piece for piece, group in pieces if group == index]

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 master copy, whole, on the CPU. Collective."""
        value = parameter if self._stage == 0 else safe_get_full_fp32_param(parameter)
        assert value is not None, "only trained tensors have a master copy"
        whole: Tensor = value.detach().float().cpu().reshape(_full_shape(parameter)).clone()
        return whole

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trained tensor, the float32 master and the forward's copy. Collective."""
        value = value.to(self._engine.device, torch.float32)
        if self._stage == 0:
            parameter.data.copy_(value)
        elif self._stage < 3:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)  # the setter leaves the forward's copy stale
        else:
            safe_set_local_fp32_param(parameter, self._shard(parameter, value))
            self.write_frozen(parameter, value)

    def write_frozen(self, parameter: Tensor, value: Tensor) -> None:
        """Set the forward's copy of a tensor, rounded to its dtype. Collective."""
        if self._stage < 3:
            parameter.data.copy_(value)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(value)

    def _shard(self, parameter: Tensor, value: Tensor) -> Tensor:
        """This rank's piece of a tensor that ZeRO 3 scatters.

        DeepSpeed's full setters fail on the last rank where the shards do not divide the tensor; a padded shard of
        this rank's own does not.
        """
        scattered: Any = parameter  # DeepSpeed adds attributes to its parameters
        size = scattered.ds_tensor.numel()
        padded = torch.zeros(size * self._world, device=value.device)
        padded[: value.numel()] = value.flatten()
        return padded[dist.get_rank() * size :][:size]

    def close(self) -> None:
        """Give the engine's memory back; the model it trained is not to be used afterwards."""
        self._engine.destroy()
        gc.collect()  # DeepSpeed's engine and its hooks refer to each other in circles
        get_accelerator().empty_cache()


def _optimizer(training: Training) -> Any:
    """AdamW, or its 8-bit kind (Dettmers et al. 2022), which keeps 32 bits in tensors below 4,096 numbers.

    In ZeRO 1 to 3 those tensors are a rank's flat pieces, so which numbers share a block depends on stage and ranks.
    """
    if training.optimizer == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim.adamw import AdamW8bit  # seconds to load, for a choice that few recipes make

    return AdamW8bit


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    """The tensor's shape when whole: ZeRO 3 leaves an empty stand-in between forwards."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
