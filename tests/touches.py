"""What others do to a module of a model, each so that its effect shows in what the model computes.

A touch gets the model, the path of the module, and a list for what calls of the module were given. An equal
list says that a module was called as often, and with things of the same names and shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Seen = list[Any]
Touch = Callable[[nn.Module, str, Seen], None]


def changed(value: Any) -> Any:
    """A result, or arguments by position, with the first floating tensor scaled, by another factor in each
    column: a norm would undo one for all, and a rotation has the same angle in two of them."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value * torch.linspace(0.75, 1.25, value.shape[-1], dtype=value.dtype)
    if isinstance(value, tuple) and value:
        return (changed(value[0]), *value[1:])
    for name in ("last_hidden_state", "logits"):  # an output of transformers, or of ours
        if isinstance(getattr(value, name, None), Tensor):
            setattr(value, name, changed(getattr(value, name)))
            break
    return value


def rearranged(value: Tensor) -> Tensor:
    """Numbers of tokens, positions or ratios, which have to stay such, in another order."""
    return value if value.is_floating_point() else value.roll(1, 0).flip(-1)


def described(value: Any) -> Any:
    """Shapes and dtypes in the place of tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (tuple, list)):
        return [described(part) for part in value]
    if isinstance(value, dict):
        return {name: described(part) for name, part in value.items()}
    return type(value).__name__


def hooks(model: nn.Module, path: str, seen: Seen) -> None:
    """Before and after the call, without keyword arguments."""

    def before(module: nn.Module, args: Any) -> Any:
        seen.append(described(args))
        return changed(args)

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        seen.append((described(args), described(out)))
        return changed(out)

    module = model.get_submodule(path)
    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def hook_with_kwargs(model: nn.Module, path: str, seen: Seen) -> None:
    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        seen.append((described(args), described(kwargs), described(out)))
        return changed(out)

    model.get_submodule(path).register_forward_hook(after, with_kwargs=True)


def pre_hook_with_kwargs(model: nn.Module, path: str, seen: Seen) -> None:
    """Changes the first argument, wherever it is, and lets everyone see everyone."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append((described(args), described(kwargs)))
        kwargs = dict(kwargs)
        for name in ("hidden_states", "hidden_state", "inputs_embeds", "pixel_values"):
            if name in kwargs:
                kwargs[name] = changed(kwargs[name])
        for name in ("input_ids", "position_ids"):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = rearranged(kwargs[name])
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:
            shown = torch.zeros_like if mask.is_floating_point() else torch.ones_like
            kwargs["attention_mask"] = shown(mask)
        args = tuple(rearranged(a) if isinstance(a, Tensor) else a for a in changed(args))
        return args, kwargs

    model.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def _derived(cls: type[nn.Module], seen: Seen) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((described(args), described(kwargs)))
        return changed(cls.forward(self, *args, **kwargs))

    name = f"Other{cls.__name__}"
    forward.__qualname__ = f"{name}.forward"  # as if it were written in the class
    return type(name, (cls,), {"forward": forward})


def subclass(model: nn.Module, path: str, seen: Seen) -> None:
    """A module of a class derived from that of the one that stood there, with its parameters."""
    owner, name = _owner(model, path)
    module = getattr(owner, name)
    other = module.__class__.__new__(module.__class__)
    other.__dict__ = {k: v for k, v in vars(module).items() if k != "forward"}
    other.__class__ = _derived(type(module), seen)
    setattr(owner, name, other)


def other_class(model: nn.Module, path: str, seen: Seen) -> None:
    """The module that stands there is of another class from now on."""
    module = model.get_submodule(path)
    module.__class__ = _derived(type(module), seen)


class Around(nn.Module):
    """A class of its own that has what stood there inside, as adapters do."""

    def __init__(self, inner: nn.Module, seen: Seen) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((described(args), described(kwargs)))
        return changed(self.inner(*args, **kwargs))


def around(model: nn.Module, path: str, seen: Seen) -> None:
    owner, name = _owner(model, path)
    setattr(owner, name, Around(getattr(owner, name), seen))


def own_forward(model: nn.Module, path: str, seen: Seen) -> None:
    module = model.get_submodule(path)
    before = module.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append((described(args), described(kwargs)))
        return changed(before(*args, **kwargs))

    module.forward = forward


def gradient_hooks(model: nn.Module, path: str, seen: Seen) -> None:
    def before(module: nn.Module, grad_output: Any) -> Any:
        seen.append(described(grad_output))
        return tuple(changed(gradient) for gradient in grad_output)

    def after(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        seen.append((described(grad_input), described(grad_output)))
        return tuple(changed(gradient) for gradient in grad_input)

    module = model.get_submodule(path)
    module.register_full_backward_pre_hook(before)
    module.register_full_backward_hook(after)


HOOKS: list[Touch] = [hooks, hook_with_kwargs, pre_hook_with_kwargs]
# These may be there before a model is accelerated, which looks at what it finds.
REPLACEMENTS: list[Touch] = [subclass, other_class, around, own_forward]


def kinds_of(model: nn.Module) -> dict[str, str]:
    """A path for every kind of submodule that is called: those that differ only in the number of a layer of
    one class are one kind, for which the first of them stands."""
    kinds: dict[str, str] = {}
    names = {"": ""}
    for path, module in model.named_modules():
        owner, _, name = path.rpartition(".")
        name = type(module).__name__ if name.isdigit() else name
        names[path] = f"{names[owner]}.{name}".lstrip(".")
        if not isinstance(module, nn.ModuleList):
            kinds.setdefault(names[path], path)
    return kinds
