"""Argument checks, one message style: the argument, what was expected, what came.

TypeError for types and dtypes, ValueError for shapes, devices and values. Checks that read values (label
range, non-finite numbers) would make a GPU wait, so there they run only under SURE_KERNELS_CHECKS=1; on the
CPU they run unless SURE_KERNELS_CHECKS=0. Nothing here runs value checks while torch.compile traces.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sure_kernels.kernel_lib.labels import counted_voxels

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
MINIMUM_PRIOR = 1e-3
FLOAT32_MAX, FLOAT64_MAX = torch.finfo(torch.float32).max, torch.finfo(torch.float64).max

Numbers = float | Sequence[float] | Tensor


_F = TypeVar("_F", bound=Callable[..., Any])
_SIMPLE = {str, int, float, bool, type(None)}
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
# Checks of each kind that are remembered.
_KEPT = 256


def remembered(check: _F) -> _F:
    """Decorator of a check of options: what plain strings and numbers came out as is not worked out again."""
    # Typed: True is no 1.
    kept = functools.lru_cache(maxsize=_KEPT, typed=True)(check)

    @functools.wraps(check)
    def call(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or not _SIMPLE.issuperset(map(type, (*args, *options.values()))):
            return check(*args, **options)
        return kept(*args, **options)

    return cast("_F", call)


def _signature(options: Iterable[Any]) -> tuple[Any, ...] | None:
    """Plain options and their types (True is no 1), those of a tuple's entries too; None where not all are plain."""
    values = tuple(options)
    kinds = tuple(map(type, values))
    if _SIMPLE.issuperset(kinds):
        return values, kinds
    entries = [_signature(x) for x in values if type(x) is tuple]
    if None in entries or not _SIMPLE.issuperset(kind for kind in kinds if kind is not tuple):
        return None
    return values, kinds, *entries


def _outline(tensor: Tensor | None) -> Any:
    """What checks see of a tensor, its values aside."""
    if tensor is None:
        return None
    return type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad


def _origin(checked: Tensor | None, tensors: Sequence[Tensor | None]) -> tuple[int, bool] | None:
    """Which of `tensors` a checked one is, and whether without its axis 1.

    None where it is made of one otherwise, or where a tensor came as two arguments: which of them it is shows in the
    next call at the earliest.
    """
    found = [
        (index, given is not checked)
        for index, given in enumerate(tensors)
        if given is checked or (given is not None and checked is not None and _squeezed(checked, given))
    ]
    return found[0] if len(found) == 1 or (found and checked is None) else None


def _squeezed(checked: Tensor, given: Tensor) -> bool:
    alike = given.ndim == checked.ndim + 1 and given.dtype == checked.dtype and given.shape[1] == 1
    return alike and checked.is_set_to(given.squeeze(1))


Checked = tuple[tuple[Any, ...], Any]


def unless_alike(check: Callable[..., Checked]) -> Callable[..., Checked]:
    """Decorator of a check of tensors and options: skipped where all that it looks at has passed before.

    `check(tensors, **options)` returns tensors, and what comes of the options. The decorated one is told first whether
    values of the tensors are to be read; then nothing is skipped.
    """
    passed: dict[tuple[Any, ...], tuple[list[tuple[int, bool]], Any]] = {}

    @functools.wraps(check)
    def call(reading: bool, tensors: tuple[Any, ...], **options: Any) -> Checked:
        signature = None
        if not reading and not torch.compiler.is_compiling() and _PLAIN.issuperset(map(type, tensors)):
            signature = _signature(options.values())
        if signature is None or any(x is not None and x.is_nested for x in tensors):
            return check(tensors, **options)
        key = (*map(_outline, tensors), signature)
        known = passed.get(key)
        if known is not None:
            steps, rest = known
            return tuple([_reached(tensors[index], squeezed) for index, squeezed in steps]), rest
        found, rest = check(tensors, **options)
        steps = [step for step in (_origin(x, tensors) for x in found) if step is not None]
        if len(steps) == len(found):
            if len(passed) >= _KEPT:
                passed.clear()
            passed[key] = steps, rest
        return found, rest

    return call


def _reached(tensor: Tensor | None, squeezed: bool) -> Tensor | None:
    return tensor.squeeze(1) if squeezed and tensor is not None else tensor


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, as messages print it."""
    return tuple(tensor.shape)


def values_checked(tensor: Tensor) -> bool:
    """Whether checks that read `tensor`'s values run (see the module's docstring)."""
    if torch.compiler.is_compiling():
        return False
    setting = os.environ.get("SURE_KERNELS_CHECKS", "")
    return setting == "1" or (tensor.device.type == "cpu" and setting != "0")


def values_read(value: object) -> bool:
    """`values_checked` of what may not be a tensor, which a check has to see."""
    return not isinstance(value, Tensor) or values_checked(value)


def plain_tensor(value: object, name: str) -> Tensor:
    """`value` as a torch.Tensor; subclasses such as MONAI's MetaTensor are unwrapped."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if type(value) is not Tensor and not isinstance(value, torch.nn.Parameter):
        if torch.compiler.is_compiling():
            return value
        value = value.as_subclass(Tensor)
    if (value.layout is not torch.strided or value.is_nested) and not torch.compiler.is_compiling():
        raise TypeError(f"{name}: expected a dense tensor, got a {'nested' if value.is_nested else value.layout} one")
    return value


def refuse_gradient(tensor: Tensor, name: str) -> None:
    """ValueError where the caller asks for a gradient that never comes."""
    if tensor.requires_grad:
        raise ValueError(f"{name}: requires a gradient, but gets none here; pass {name}.detach()")


def refuse_swapped(values: Tensor, name: str, scores: Tensor, scores_name: str) -> None:
    """ValueError where only the scores, which get no gradient, ask for one: the loss would train nothing."""
    if torch.is_grad_enabled() and scores.requires_grad and not values.requires_grad:
        raise ValueError(
            f"{scores_name}: requires a gradient, but the loss gives one to {name} alone, which requires none; "
            f"expected ({name}, {scores_name}) in this order, or {scores_name}.detach()"
        )


def shown(value: object) -> str:
    """`value` in a few characters, as messages print it."""
    try:
        text = str(value)
    except ValueError:  # Python prints no integers of more than 4300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_float_map(value: object, name: str, *, minimum_channels: int = 1) -> Tensor:
    """A floating-point map (N, C, *spatial) with two or three spatial axes, none of them empty."""
    tensor = plain_tensor(value, name)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.ndim not in (4, 5):
        raise ValueError(f"{name}: expected shape (N, C, *spatial) with 2 or 3 spatial axes, got {shape_of(tensor)}")
    if tensor.shape[1] < minimum_channels:
        raise ValueError(f"{name}: expected at least {minimum_channels} entries along axis 1, got {shape_of(tensor)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: expected no axis of length 0, got {shape_of(tensor)}")
    return tensor


def check_logits(logits: object) -> Tensor:
    """Logits (N, K, *spatial), K >= 2."""
    return check_float_map(logits, "logits", minimum_channels=2)


def check_same_device(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} like {other_name}, got {tensor.device}")


def check_target(
    target: object, logits: Tensor, ignore_index: int, mask: Tensor | None = None, *, owner: str = "logits"
) -> Tensor:
    """The index map (N, *spatial) of `target`; (N, 1, *spatial) is squeezed, one-hot is reduced once.

    `owner` names the argument that `logits` is.
    """
    tensor = plain_tensor(target, "target")
    n, k, *spatial = logits.shape
    index_shape = (n, *spatial)
    check_same_device(tensor, "target", logits, owner)
    if shape_of(tensor) == shape_of(logits):
        refuse_gradient(tensor, "target")
        tensor = _real(tensor, "target")
        if values_checked(tensor):
            single = ((tensor == 0) | (tensor == 1)).all(1) & ((tensor == 1).sum(1) == 1)
            if mask is not None:
                single = single | ~mask
            if not bool(single.all()):
                raise ValueError(
                    f"target: shape {shape_of(tensor)} is read as one-hot, expected a single 1 and else 0 at every "
                    f"voxel, got something else at {int((~single).sum())} of them"
                )
        return (tensor if tensor.dtype != torch.bool else tensor.to(torch.uint8)).argmax(1)
    if tensor.dtype not in INT_DTYPES:
        shaped = shape_of(tensor) in (index_shape, (n, 1, *spatial))
        wanted, found = ("", "") if shaped else (f" of shape {index_shape}", f" of {shape_of(tensor)}")
        raise TypeError(f"target: expected integer labels{wanted}, got {tensor.dtype}{found}; target.long() has them")
    if shape_of(tensor) == (n, 1, *spatial):
        tensor = tensor.squeeze(1)
    if shape_of(tensor) != index_shape:
        raise ValueError(
            f"target: expected integer labels of shape {index_shape} to match {owner} {shape_of(logits)}, "
            f"got {shape_of(tensor)}"
        )
    tensor = torch_integer(tensor, "target")
    if values_checked(tensor):
        check_label_range(tensor, k, ignore_index, mask)
    return tensor


def torch_integer(tensor: Tensor, name: str) -> Tensor:
    """uint16, uint32 and uint64 lack most of torch's operations: hold them in the next wider signed type.

    ValueError for a uint64 that int64 does not hold: it would come out negative, -100 for 2^64 - 100.
    """
    if tensor.dtype == torch.uint16:
        return tensor.to(torch.int32)
    if tensor.dtype == torch.uint32:
        return tensor.to(torch.int64)
    if tensor.dtype == torch.uint64:
        signed = tensor.to(torch.int64)
        if values_checked(signed) and bool((signed < 0).any()):
            raise ValueError(f"{name}: expected values below 2^63, got larger ones in {int((signed < 0).sum())} places")
        return signed
    return tensor


def _real(tensor: Tensor, name: str) -> Tensor:
    """`tensor` where its dtype is boolean or one of real numbers; the unsigned ones as `torch_integer` holds them."""
    if tensor.dtype in INT_DTYPES:
        return torch_integer(tensor, name)
    if tensor.dtype != torch.bool and tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected booleans, integers or real numbers, got {tensor.dtype}")
    return tensor


def as_boolean(tensor: Tensor, name: str) -> Tensor:
    """Booleans as they are; numbers must be 0 or 1."""
    if tensor.dtype == torch.bool:
        return tensor
    refuse_gradient(tensor, name)
    tensor = _real(tensor, name)
    if values_checked(tensor):
        other = ~((tensor == 0) | (tensor == 1))
        if bool(other.any()):
            raise ValueError(f"{name}: expected only 0 and 1, got {float(tensor[other][0]):g} among them")
    return tensor != 0


def check_label_range(target: Tensor, k: int, ignore_index: int, mask: Tensor | None = None) -> None:
    """ValueError unless every counted label lies in [0, k)."""
    low, high = (int(v) for v in torch.aminmax(target))
    if low >= 0 and high < k:
        return
    wrong = ((target < 0) | (target >= k)) & counted_voxels(target, ignore_index, mask)
    if bool(wrong.any()):
        found = torch.unique(target[wrong])[:5].tolist()
        raise ValueError(
            f"target: expected labels in [0, {k - 1}] or ignore_index={ignore_index}, got {found} "
            f"in {int(wrong.sum())} voxels"
        )


def check_mask(mask: object, n: int, spatial: Sequence[int], like: Tensor) -> Tensor | None:
    """A boolean (N, *spatial) mask, or None; (N, 1, *spatial) and 0/1 numbers are accepted."""
    if mask is None:
        return None
    tensor = plain_tensor(mask, "mask")
    check_same_device(tensor, "mask", like, "the map it belongs to")
    if shape_of(tensor) == (n, 1, *spatial):
        tensor = tensor.squeeze(1)
    if shape_of(tensor) != (n, *spatial):
        raise ValueError(f"mask: expected shape {(n, *spatial)} or {(n, 1, *spatial)}, got {shape_of(tensor)}")
    return as_boolean(tensor, "mask")


def check_voxel_map(
    value: object, name: str, n: int, spatial: Sequence[int], like: Tensor, *, owner: str = "logits"
) -> Tensor:
    """A map with one number a voxel, (N, 1, *spatial) or (N, *spatial), returned as (N, *spatial).

    `owner` names the argument that `like` is.
    """
    tensor = plain_tensor(value, name)
    check_same_device(tensor, name, like, owner)
    if shape_of(tensor) == (n, 1, *spatial):
        tensor = tensor.squeeze(1)
    if shape_of(tensor) != (n, *spatial):
        raise ValueError(f"{name}: expected shape {(n, 1, *spatial)}, got {shape_of(tensor)}")
    return tensor


def check_distances(distance: Tensor, counted: Tensor | None = None, name: str = "distance") -> None:
    """ValueError where a `counted` distance is negative, as in signed maps. NaN is neither near nor far."""
    if not values_checked(distance) or not distance.numel() or float(distance.min()) >= 0:
        return
    wrong = distance < 0 if counted is None else (distance < 0) & counted.view_as(distance)
    if bool(wrong.any()):
        raise ValueError(
            f"{name}: expected distances of at least 0, got {float(distance[wrong].min()):g} and the like at "
            f"{int(wrong.sum())} voxels (a signed distance map?)"
        )


def check_sequence(value: object, name: str, of: str) -> None:
    """TypeError unless a list, a tuple, or a tensor with a first axis to go along."""
    single = isinstance(value, Tensor) and value.ndim == 0
    if single or not isinstance(value, (list, tuple, Tensor)):
        found = "a 0-d tensor" if single else type(value).__name__
        raise TypeError(f"{name}: expected a sequence of {of}, got {found}")


def check_choice(value: object, name: str, choices: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(choices)}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_compat(compat: object) -> bool:
    """True for compat="official"."""
    if compat is None:
        return False
    return check_choice(compat, "compat", ("official",)) == "official"


def check_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def check_process_group(group: Any) -> Any:
    """A torch.distributed.ProcessGroup, or None."""
    if group is None or torch.compiler.is_compiling():
        return group
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group


def check_number(
    value: object,
    name: str,
    *,
    minimum: float = 0.0,
    exclusive: bool = False,
    infinite: bool = False,
    largest: float = FLOAT32_MAX,
) -> float:
    """A finite Python number of at least `minimum` (above it where `exclusive`) and at most `largest` in size."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Comparisons alone, which torch.compile can trace for a number that changes from call to call; NaN fails them. They
    # come before float(), which integers may be too large for.
    given: Any = value
    too_small = given <= minimum if exclusive else given < minimum
    if not (given >= -math.inf if infinite else -math.inf < given < math.inf) or too_small:
        bound = "" if minimum == -math.inf else f" above {minimum:g}" if exclusive else f" of at least {minimum:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {shown(value)}")
    if given < -largest or (given > largest and given != math.inf):
        raise ValueError(f"{name}: expected a number up to {largest:.3g}, got {shown(value)}")
    return float(given)


def number_tuple(value: Numbers, name: str, length: int | None, owner: str) -> tuple[float, ...]:
    """`length` Python floats from a number, a sequence or a 0-d or 1-d tensor; of a sequence any number where None."""
    wanted = f"one number or {f'one per {owner}' if length is None else length}"
    given: Any = value
    if isinstance(given, Tensor):
        refuse_gradient(given, name)
        if given.ndim > 1:
            raise ValueError(f"{name}: expected {wanted}, got shape {shape_of(given)}")
        given = given.tolist()
    if isinstance(given, Real) and not isinstance(given, bool):
        given = (given,) * (1 if length is None else length)
    if isinstance(given, (str, bytes, Mapping, Set)):
        raise TypeError(f"{name}: expected {wanted}, got {type(given).__name__}")
    if not isinstance(given, Sequence):
        try:
            given = list(given)  # numpy arrays and other iterables
        except TypeError:
            raise TypeError(f"{name}: expected {wanted}, got {type(given).__name__}") from None
    if any(isinstance(v, (bool, str)) or not hasattr(v, "__float__") for v in given):
        raise TypeError(f"{name}: expected numbers, got {shown(given)}")
    numbers = tuple(math.inf if isinstance(v, int) and abs(v) > FLOAT32_MAX else float(v) for v in given)
    if length is not None and len(numbers) != length:
        raise ValueError(f"{name}: expected {length} numbers, one per {owner}, got {len(numbers)}")
    if any(FLOAT32_MAX < abs(v) < math.inf for v in numbers):
        raise ValueError(f"{name}: expected numbers up to {FLOAT32_MAX:.3g}, got {numbers}")
    return numbers


def settled(value: Numbers | None, name: str) -> float | tuple[float, ...] | None:
    """Numbers as Python holds them, read once; one stays one, since how many it stands for shows later."""
    if value is None:
        return None
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0):
        return number_tuple(value, name, None, "entry")[0]
    return number_tuple(value, name, None, "entry")


def check_prior(prior: Numbers, k: int | None) -> tuple[float, ...]:
    """The prior as K floats (as many as given where `k` is not known), each at least 1e-3."""
    numbers = number_tuple(prior, "prior", k, "class")
    if not all(MINIMUM_PRIOR <= v < math.inf for v in numbers):
        raise ValueError(f"prior: expected finite entries of at least {MINIMUM_PRIOR:g}, got {numbers}")
    return numbers


def check_class_weight(class_weight: Numbers | None, k: int | None) -> tuple[float, ...] | None:
    if class_weight is None:
        return None
    if isinstance(class_weight, Real) or getattr(class_weight, "ndim", 1) == 0:
        raise TypeError(f"class_weight: expected {'K' if k is None else k} numbers, one per class, got a single number")
    numbers = number_tuple(class_weight, "class_weight", k, "class")
    if not all(0 <= v < math.inf for v in numbers) or sum(numbers) == 0:
        raise ValueError(f"class_weight: expected finite numbers >= 0, not all 0, got {numbers}")
    return numbers


def check_spacing(spacing: Numbers | None, ndim: int | None) -> tuple[float, ...]:
    """Voxel spacing in array-axis order, 1 where None."""
    if spacing is None:
        return (1.0,) * (1 if ndim is None else ndim)
    numbers = number_tuple(spacing, "spacing", ndim, "spatial axis")
    if not all(0 < v < math.inf for v in numbers):
        raise ValueError(f"spacing: expected positive finite numbers, got {numbers}")
    return numbers


def check_int(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {shown(number)}")
    return number


def check_count(value: object, name: str, *, minimum: int = 1, maximum: int | None = None) -> int:
    """An int from `minimum` to `maximum`."""
    number = check_int(value, name)
    if number < minimum or (maximum is not None and number > maximum):
        wanted = f"at least {minimum}" if maximum is None or number < minimum else f"at most {maximum}"
        raise ValueError(f"{name}: expected {wanted}, got {number}")
    return number


def explain_non_finite(tensor: Tensor, valid: Tensor, name: str = "logits") -> None:
    """For use after a non-finite result: ValueError naming NaN or infinity in counted voxels of (N, C, *spatial)."""
    bad = ~torch.isfinite(tensor).all(1) & valid
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise ValueError(
            f"{name}: expected finite values in counted voxels, got NaN or infinity in {int(bad.sum())} of them, "
            f"first at (n, *spatial) = {tuple(where)}"
        )
