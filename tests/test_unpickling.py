"""Pickles are opened by a confined process. Here `torch.load` has a hole, as it had before: what is in a pickle runs.

`hole.py` is that process but for the hole; `confined=False` is what would come of it in an ordinary one.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.bundle.safetensors_header import read_header
from latentrt.engines.errors import CheckpointError
from latentrt.export.sources import pickles
from latentrt.export.sources.pickles import load_pickle, read_pickle_header

HOLE = """
import pickle, sys
from pathlib import Path
from latentrt.export.work import confinement, unpickling

def run(path):
    try:
        pickle.loads(path.read_bytes())
    except OSError as error:
        raise unpickling.NotWeightsError(f"errno {error.errno}")
    raise unpickling.NotWeightsError("done")

unpickling.open_weights = run
CHANGES
if __name__ == "__main__":
    unpickling.main(Path(sys.argv[1]))
"""
NOT_CONFINED = "unpickling.confine = lambda reads: []"
NO_LANDLOCK = "confinement._close_files = lambda libc, reads: False"
NO_FILTER = "confinement.ARCHITECTURES = {}"


class Code:
    """A pickle that runs code when it is opened carelessly."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (self.code,))


@pytest.fixture
def hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have pickles opened by a process with the hole, changed by a line of code. What it may read holds no home."""

    def dig(changes: str) -> None:
        folder = tmp_path / "library"
        folder.mkdir()
        (folder / "hole.py").write_text(HOLE.replace("CHANGES", changes))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setattr(pickles.unpickling, "__name__", "hole")

    return dig


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    (home / "key").write_text("secret")
    return home


def opened(folder: Path, code: str) -> str:
    """Open a pickle with this code in it; return the reason for which it is refused: what became of the code."""
    path = folder / "model.ckpt"
    path.write_bytes(pickle.dumps(Code(code)))
    with pytest.raises(CheckpointError) as caught:
        read_pickle_header(path)
    return str(caught.value).partition("(")[2].partition(")")[0]


REFUSED = {f"errno {number}" for number in (errno.EACCES, errno.EPERM, errno.EXDEV)}
FILES = {
    "write": "open('{home}/new', 'w')",
    "append": "open('{home}/key', 'a').write('more')",
    "empty": "import os; os.truncate('{home}/key', 0)",
    "remove": "import os; os.remove('{home}/key')",
    "rename": "import os; os.rename('{home}/key', '{home}/other')",
    "link": "import os; os.symlink('/', '{home}/link')",
    "folder": "import os; os.mkdir('{home}/folder')",
    "read": "open('{home}/key').read()",
    "list": "import os; os.listdir('{home}')",
    "environment": "open('/proc/{parent}/environ', 'rb').read()",
}


def everything(home: Path) -> dict[str, Any]:
    return {path.name: path.read_text() if path.is_file() else path.is_symlink() for path in home.iterdir()}


@pytest.mark.parametrize("attack", FILES)
def test_a_pickle_reaches_no_file(attack: str, home: Path, hole: Any, tmp_path: Path) -> None:
    hole("")
    assert opened(tmp_path, FILES[attack].format(home=home, parent=os.getpid())) in REFUSED
    assert everything(home) == {"key": "secret"}


@pytest.mark.parametrize("attack", FILES)
def test_it_would_reach_them_in_a_process_that_is_not_confined(
    attack: str, home: Path, hole: Any, tmp_path: Path
) -> None:
    hole(NOT_CONFINED)
    assert opened(tmp_path, FILES[attack].format(home=home, parent=os.getpid())) == "done"


def test_what_a_pickle_starts_reaches_no_file_either(home: Path, hole: Any, tmp_path: Path) -> None:
    hole("")
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', \"open('{home}/new', 'w')\"])"
    assert opened(tmp_path, code) == "done"
    assert everything(home) == {"key": "secret"}


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Sockets that would take a message, and the code that sends one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as named,
    ):
        udp.bind(("127.0.0.1", 0))
        named.bind(str(tmp_path / "s"))
        named.listen()
        yield {
            "tcp": f"import socket; socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 10)",
            "udp": f"import socket; socket.socket(2, 2).sendto(b'secret', ('127.0.0.1', {udp.getsockname()[1]}))",
            "unix": f"import socket; socket.socket(1).connect('{tmp_path}/s')",
            "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
        }


@pytest.mark.parametrize(("changes", "outcomes"), [("", REFUSED), (NOT_CONFINED, {"done"})], ids=["confined", "not"])
@pytest.mark.parametrize("attack", ["tcp", "udp", "unix", "listen"])
def test_a_pickle_opens_no_socket(
    attack: str, changes: str, outcomes: set[str], listening: dict[str, str], hole: Any, tmp_path: Path
) -> None:
    hole(changes)
    assert opened(tmp_path, listening[attack]) in outcomes


def test_the_process_gets_no_keys_of_the_environment(
    hole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hole("")
    assert opened(tmp_path, "import os; os.environ['PATH']; 'HF_TOKEN' in os.environ and open('/none')") == "done"


@pytest.mark.parametrize(("changes", "left"), [("", []), (NO_LANDLOCK, ["files"]), (NO_FILTER, ["network"])])
def test_what_a_system_cannot_close_is_said(
    changes: str, left: list[str], hole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hole(changes)
    assert opened(tmp_path, "") == "done"
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == left


def test_without_landlock_no_file_grows(home: Path, hole: Any, tmp_path: Path) -> None:
    hole(NO_LANDLOCK)
    assert opened(tmp_path, f"open('{home}/key', 'a', 0).write(b'more')".replace("'a'", "'ab'")) in {
        f"errno {errno.EFBIG}"
    }
    assert (home / "key").read_text() == "secret"


def test_every_kind_of_tensor_arrives_as_it_was_saved(tmp_path: Path) -> None:
    import torch

    numbers = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool]
    saved = {str(kind): numbers.to(kind) for kind in [*kinds, torch.float8_e4m3fn, torch.float8_e5m2]}
    saved |= {"turned": numbers.T, "part": numbers[1:, ::2], "same": numbers, "again": numbers}
    saved |= {"one": torch.tensor(3.5), "none": torch.zeros(0, 4), "trained": torch.nn.Parameter(numbers)}
    path = tmp_path / "weights.pt"
    torch.save(saved, path)
    found = load_pickle(path)
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].detach().float().tolist() == tensor.detach().float().tolist()


def test_the_header_is_that_of_the_file_it_is_turned_into(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.ones(2, 3, dtype=torch.float16), "b": torch.zeros(5, dtype=torch.int64)}
    torch.save(tensors, tmp_path / "weights.pt")
    save_file(tensors, tmp_path / "weights.safetensors")
    found, expected = read_pickle_header(tmp_path / "weights.pt"), read_header(tmp_path / "weights.safetensors")
    assert {key: (stored.dtype, stored.shape) for key, stored in found.tensors.items()} == {
        key: (stored.dtype, stored.shape) for key, stored in expected.tensors.items()
    }


@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_pickle_that_is_cut_is_refused_in_one_sentence(kept: float, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2, 3)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError) as caught:
        load_pickle(path)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_safetensors_cannot_hold_is_refused(tmp_path: Path) -> None:
    import torch

    torch.save({"a": torch.ones(2, 3).to_sparse()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError):
        read_pickle_header(tmp_path / "weights.pt")


def test_a_full_temporary_folder_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    torch.save({"a": torch.ones(2, 3)}, tmp_path / "weights.pt")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(CheckpointError):
        load_pickle(tmp_path / "weights.pt")
