"""Fixtures that tests share: real data, compiled programs, uninterrupted runs."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import several
from filelock import FileLock
from hypothesis import settings
from runs import ALL_THREADS, AVERAGED, DIGITS, REFERENCE, SMALL, Run, compile_once, end

settings.register_profile("suite", deadline=None)  # Other tests run at the same time.
settings.load_profile("suite")
# XLA's threads wait actively, and here several processes share few cores: with one thread each they take an eighth less
# processor time. Runs with `ALL_THREADS` use all cores, as a user's do.
os.environ.setdefault("PJRT_NPROC", "1")
os.environ.pop("PYTHONUNBUFFERED", None)  # Tests of a closed pipe need buffered output.
# A shell's `&` and `nohup` ignore these signals, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


SLOW = ("test_multihost", "test_train", "test_slurm", "test_loop", "test_demo", "test_faults", "test_trouble")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow files first, so that no worker is idle at the end."""
    order = {stem: place for place, stem in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder of the four official MNIST files, named by `MNIST_DIR`; without it these tests are skipped."""
    if "MNIST_DIR" not in os.environ:
        pytest.skip("MNIST_DIR names no folder with the four official MNIST files")
    return Path(os.environ["MNIST_DIR"]).absolute()


@pytest.fixture(scope="session")
def environment(tmp_path_factory, shared_folder) -> dict[str, str]:
    """Environment variables: an empty home, a compilation cache with the usual programs, no network.

    Each worker has its own copy of the cache, because JAX's cache is not safe with several writers.
    """
    home = tmp_path_factory.mktemp("home")
    made = shared_folder / "programs"
    with FileLock(shared_folder / "programs.lock"):
        if not made.exists():
            args = (*DIGITS, "--steps", "3", "--log-every-steps", "2")
            one, averaged, two = (Run(home / name / "run", _isolated(home / name)) for name in ("1", "averaged", "2"))
            started = [one.start(*args), averaged.start(*args, *AVERAGED), *several.start(two, *args).processes]
            ended = [end(process) for process in started]
            assert [one.code for one in ended] == [0] * 4, ended
            for run in (one, averaged, two):
                shutil.copytree(run.workdir.with_name("mnist_jax"), made, dirs_exist_ok=True)
    shutil.copytree(made, home / "mnist_jax")
    return _isolated(home)


def _isolated(home: Path) -> dict[str, str]:
    closed_port = "http://127.0.0.1:9"
    return {"HOME": str(home), "XDG_CACHE_HOME": str(home), "http_proxy": closed_port, "https_proxy": closed_port}


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id) -> Path:
    """A folder that all test workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def finished_once(shared_folder, environment) -> Callable[..., Run]:
    """Return a function that returns a finished run, made once for all workers. Read-only."""

    def start_one(run: Run, *args: str) -> several.Several:
        return several.Several(run, [run.start(*args)])

    def finish(name: str, *args: str, start: Callable[..., several.Several] = start_one, **variables: str) -> Run:
        run = Run(shared_folder / name, {**environment, **variables})
        with FileLock(shared_folder / f"{name}.lock"):
            if not run.events("exit"):
                for ended in start(run, *args).end():
                    assert ended.code == 0, ended.err
        return run

    return finish


@pytest.fixture(scope="session")
def reference(finished_once) -> Run:
    """A run with the flags `REFERENCE`: the default preset, and all cores."""
    return finished_once("reference", *REFERENCE, **ALL_THREADS)


@pytest.fixture(scope="session")
def trained_run(finished_once, mnist_dir) -> Run:
    """A default run on MNIST."""
    return finished_once("trained", "--data-dir", str(mnist_dir), **ALL_THREADS)


@pytest.fixture(scope="session")
def small_run(finished_once) -> Run:
    """A run on the built-in digits with checkpoints 10, 20, 30 and 40.

    The evaluation at step 20 uses averaged weights, as all evaluations do.
    """
    return finished_once("small", *SMALL)


@pytest.fixture
def small_copy(small_run, tmp_path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(small_run.workdir, tmp_path / "run"))


@pytest.fixture
def new_run(tmp_path, environment) -> Callable[..., Run]:
    """Return a function that makes a run in its own directory."""

    def make(name: str = "run", **variables: str) -> Run:
        return Run(tmp_path / name, {**environment, **variables})

    return make


@pytest.fixture(scope="module", autouse=True)
def _variables_are_restored() -> Iterator[None]:
    """Restore what a run in this process sets in the environment: other files start processes that inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "PJRT_NPROC"):
            patch.setenv(name, os.environ.get(name, ""))
        yield


@pytest.fixture(scope="module")
def no_optimizations() -> Iterator[None]:
    """Compile quickly on CPUs, for tests of values that compile many programs and run each once."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu" or before)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # Other tests compile their own programs.


@pytest.fixture(scope="module")
def in_this_process(environment) -> Iterator[None]:
    """Make runs in this process possible: programs are compiled once."""
    from jax.experimental.compilation_cache import compilation_cache

    from mnist_jax.training import trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
        compilation_cache.reset_cache()  # JAX opens a directory once; tests of another file may have used another one.
        patch.setattr(trainer.Trainer, "compile", compile_once(trainer.Trainer.compile))
        yield
