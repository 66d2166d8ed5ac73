"""The errors that mean bad input rather than a bug: the command line prints their sentence, without a traceback."""

from sdjax.checkpoint import CheckpointError
from sdjax.engines import EngineError
from sdjax.models.fields import ModelError
from sdjax.options import OptionError
from sdjax.planning.chips import PlanError
from sdjax.processes import ProcessError
from sdjax.report.runs import ReportError
from sdjax.rollouts import RolloutError
from sdjax.run_folder import RunError
from sdjax.sharding import MeshError
from sdjax.tasks.errors import TaskError
from sdjax.tokens import LengthError
from sdjax.train import ExperimentError

INPUT_ERRORS = (
    CheckpointError,
    EngineError,
    ExperimentError,
    LengthError,
    MeshError,
    ModelError,
    OptionError,
    PlanError,
    ReportError,
    ProcessError,
    RolloutError,
    RunError,
    TaskError,
)
