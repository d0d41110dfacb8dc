"""Shapes are enforced while testing, and every test must leave PyTorch's global state as it found it."""

from collections.abc import Iterator

from jaxtyping import install_import_hook

install_import_hook("fewstep", "beartype.beartype")  # before anything of fewstep is imported, and for good

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _globals_untouched() -> Iterator[None]:
    before = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
    )
    yield
    after = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
    )
    assert before == after, "a test changed PyTorch's global state"
