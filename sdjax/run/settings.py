"""What every experiment lets its user choose: one frozen type, each option with its help text and its heading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax

from sdjax.devices.memory import parsed
from sdjax.devices.sharding import mesh_shape
from sdjax.engine import optimizers, routers
from sdjax.engine.sensible import check_numbers
from sdjax.engine.tokens import Shapes, refuse, shorten
from sdjax.engine.train import Experiment
from sdjax.models import adapters, pretrained, templates
from sdjax.models.pretrained import Pretrained
from sdjax.run import teachers
from sdjax.run.logs import trackers
from sdjax.run.teachers import Teachers
from sdjax.tasks import exact, judges, maths
from sdjax.tasks.errors import TaskError
from sdjax.tasks.judges import Judge
from sdjax.types import Method, Task


def option(default: Any, heading: str, text: str) -> Any:
    """A field of `Settings`: its default, the heading that `--help` lists it under, and its help text."""
    return dataclasses.field(default=default, metadata={"heading": heading, "help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of every experiment.  An experiment file takes them as one argument, with defaults of its own:

        def experiment(*, method: Choice, settings: Settings = Settings(steps=40, lr=2e-5), ...) -> Experiment:

    On the command line they are plain options (`--steps 40`).  In Python: `dataclasses.replace(settings, steps=40)`.

    Raises (on construction): `ExperimentError`, `MeshError`, `ModelError`, `TaskError` or `EngineError` for a value that makes no sense.
    """

    model: str = option("smollm2", "model", "a hub name, a folder in the transformers format, or smollm2 (embedded)")
    bf16: bool = option(False, "model", "compute in bfloat16; parameters are kept as --params-dtype says")
    params_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "model",
        "what the weights are kept in; bfloat16: the rest of each float32 number is kept with the optimizer, none is lost",
    )
    lora_rank: int = option(
        0, "model", "train adapters of this rank on frozen weights; 0 trains the weights themselves"
    )
    lora_base: Literal["float", "int8", "nf4"] = option(
        "float", "model", "the type of the frozen matrices under adapters; int8 and nf4 need sdjax[lora]"
    )
    lora_experts: bool = option(
        False, "model", "adapters of the matrices of experts, too, a pair for each expert; they are frozen otherwise"
    )
    export_dtype: Literal["original", "float32", "bfloat16", "float16"] = option(
        "original",
        "model",
        "type of the weights in model/; original: as they were loaded, which may round away small changes",
    )
    chat_template: str = option("", "model", "a file with the chat template, for models that have none")
    template: str = option(
        "",
        "model",
        "options of the chat template for all that student and teachers read, one by one as "
        "--template.enable-thinking false, or together as JSON",
    )
    mesh: str = option(
        "",
        "model",
        "devices as DATAxMODEL, for example 4x2; by default all on the data axis.  DATAxMODELxEXPERT, for example 2x1x4, "
        "splits the experts of a mixture over a third axis, and rows over it as over data",
    )

    teacher: str = option(
        "",
        "teacher",
        "another model that teaches, for methods that take one: a folder, a hub name, smollm2, a .gguf file, or the "
        "address of a server, as http://localhost:8000/v1",
    )
    teacher_dtype: Literal["float32", "bfloat16"] | None = option(
        None,
        "teacher",
        "what teachers compute in and are kept in; None: they compute as the student does and are kept in float32",
    )
    teacher_engine: Literal["vllm", "sglang"] = option("vllm", "teacher", "which kind of server teaches")
    teacher_served: str = option(
        "default", "teacher", "the name by which the server knows its model; its key, if any, is in SDJAX_API_KEY"
    )
    teachers: str = option("", "teacher", "several, as math=MODEL,code=MODEL; each problem has one of them")
    teacher_field: str = option("", "teacher", "the field of a problem that names which of the teachers it has")
    lesson: Literal["auto", "solution"] = option(
        "auto",
        "teacher",
        "what a teacher reads besides the question; auto: nothing where another model teaches, else what the experiment "
        "or the method's paper says; solution: the problem's solution, whoever teaches",
    )

    judge: str = option(
        "",
        "judge",
        "the address of an OpenAI-compatible server whose model rewards answers in place of the task's verifier, as "
        "http://localhost:8000/v1; its key, if any, is in SDJAX_API_KEY",
    )
    judge_model: str = option("", "judge", "the name by which the server knows the judging model")
    judge_rubric: str = option("", "judge", "a text file that says what earns a score")
    judge_scores: str = option("0-10", "judge", "the lowest and the highest score; they are the rewards 0 and 1")

    steps: int = option(100, "training", "batches to train on")
    prompts: int = option(4, "training", "problems per batch; the method's group size is attempts per problem")
    rounds: int = option(1, "training", "batches in a row with the same problems and fresh attempts (RESD uses 4)")
    minibatches: int = option(1, "training", "updates per batch, each on whole groups")
    epochs: int = option(1, "training", "times that each batch is read")
    lr: float = option(1e-6, "training", "peak learning rate; adapters usually want a larger one")
    optimizer: Literal["adamw", "adafactor"] = option(
        "adamw", "training", "adafactor keeps sums of rows and columns in place of two moments: nearly no memory"
    )
    first_moment_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "training", "the type of AdamW's first moment: bfloat16 takes 2 bytes per parameter less"
    )
    warmup: int = option(0, "training", "steps of linear rise to the peak learning rate")
    weight_decay: float = option(0.01, "training", "decoupled weight decay")
    clip_norm: float = option(1.0, "training", "largest norm of the gradient; a larger gradient is scaled down")
    router_aux: float = option(
        0.0,
        "training",
        "of a mixture of experts: how much to add of the loss that balances the load of experts (0.001 to 0.01 in papers)",
    )
    router_z: float = option(
        0.0,
        "training",
        "of a mixture of experts: how much to add of the loss that keeps its routers' logits small (0.001)",
    )
    seed: int = option(0, "training", "seed of the problems' order and of every sample")
    smoke: bool = option(False, "training", "two steps on a few problems, to see that everything works")

    context: int = option(512, "memory", "most tokens of a prompt")
    completion: int = option(128, "memory", "most tokens of an attempt")
    shorten_prompts: bool = option(
        False,
        "memory",
        "cut prompts that are too long instead of refusing them: oldest turns first, then the end of privileged text, "
        "never the question",
    )
    teacher_context: int | None = option(
        None, "memory", "most tokens that a teacher reads; None: what question, lesson and completion need"
    )
    memory: str = option(
        "auto",
        "memory",
        "memory that a device may give: auto looks what there is, off does not look, 12GB says it; the four options "
        "below are chosen by it where they are not given, and never change what is learnt",
    )
    rows: int | None = option(None, "memory", "attempts that one call of the sampler writes")
    rows_per_chunk: int | None = option(None, "memory", "rows whose activations the update holds at a time")
    tokens_per_chunk: int | None = option(None, "memory", "positions whose logits the update holds at a time")
    remat: bool | None = option(None, "memory", "recompute blocks in the backward pass: less memory for more time")
    lengths: int = option(
        1,
        "memory",
        "to how many lengths rows are cut in an update, sorted: with 16 hardly any padding is computed where lengths differ "
        "much, and its program takes longer to compile (--scan); not on a mesh",
    )
    scan: bool = option(False, "memory", "loop over the layers instead of compiling each: for deep models on TPUs")

    evaluation: int = option(
        100, "evaluation", "held-out problems, answered before and after training; how: --evaluate.samples and its like"
    )
    evaluate_every: int = option(0, "evaluation", "steps between evaluations; 0: only before and after training")
    save_every: int = option(25, "saving", "steps between checkpoints; 0: only at the end")
    keep: int = option(2, "saving", "how many of the newest checkpoints stay")
    keep_every: int = option(0, "saving", "checkpoints of every so many steps stay, too; 0: none of them")
    keep_best: bool = option(
        False,
        "saving",
        "the checkpoint with the highest held-out accuracy stays, too: let --evaluate-every be a multiple of --save-every",
    )
    grace: float = option(
        0.0,
        "saving",
        "seconds from a signal (SIGTERM, Ctrl-C) to the end: a save that takes longer is given up; 0: no limit",
    )

    log: str = option(
        "tensorboard",
        "log",
        "where numbers and completions go beside the run's folder: tensorboard, wandb, mlflow, trackio, or several, "
        "as wandb,tensorboard",
    )
    log_project: str = option(
        "sdjax", "log", "the project, or in MLflow the experiment, that trackers put the run into"
    )
    completions_every: int = option(10, "log", "steps between recorded completions")
    stop_on: Literal["nothing", "collapse"] = option(
        "nothing",
        "log",
        "collapse: end the run, saved, when reward or held-out accuracy has collapsed (sdjax/run/README.md)",
    )

    def __post_init__(self):
        check_numbers(dataclasses.asdict(self))
        mesh_shape(self.mesh)
        if self.memory != "off":
            parsed(self.memory)
        adapters.chosen(self.lora_rank, self.lora_base, self.lora_experts)
        self.chosen_teachers()
        self.chosen_judge()
        templates.parsed(self.template)
        trackers.chosen(self.log)

    def student(self) -> Pretrained:
        """The model that is trained, with its chat template.  Raises `ModelError`."""
        return pretrained.opened(self.model, chat_template=self.chat_template, template=templates.parsed(self.template))

    def chosen_teachers(self) -> Teachers:
        """The models that teach, by the name of their policy."""
        server = {"engine": self.teacher_engine, "served": self.teacher_served}
        return teachers.chosen(self.teacher, self.teachers, self.teacher_field, **server)

    def chosen_judge(self) -> Judge | None:
        """The judge that rewards answers, if there is one.  Raises: TaskError, EngineError."""
        return judges.chosen(self.judge, self.judge_model, self.judge_rubric, self.judge_scores)

    def method(self, choice: Callable[..., Method], lesson: Callable | None = None) -> Method:
        """The method of an experiment's `method` argument with its teachers; `lesson` is what the experiment tells them.

        Raises: TeacherError where the method has no teacher, or needs one, or cannot have these.
        """
        return teachers.taught(choice, self.chosen_teachers(), lesson, told=self.lesson == "solution")

    def shortened(self) -> Settings:
        """The same settings, or with `smoke` those of two steps on a few problems."""
        if not self.smoke:
            return self
        few = {"steps": 2, "prompts": 2, "minibatches": 1, "evaluation": 4, "evaluate_every": 0, "save_every": 0}
        few |= {"keep_best": False}
        return dataclasses.replace(self, **few)

    def chosen_optimizer(self) -> optax.GradientTransformation:
        """The optimizer after clipping by the global norm; the learning rate rises linearly to `lr`, then stays."""
        first = self.lr / max(self.warmup, 1)
        rate = optax.schedules.warmup_constant_schedule(first, self.lr, self.warmup) if self.warmup else self.lr
        moment = {"first_moment": self.first_moment_dtype}
        return optimizers.chosen(
            self.optimizer, rate, weight_decay=self.weight_decay, clip_norm=self.clip_norm, **moment
        )

    def shapes(self) -> Shapes:
        """The sizes that programs are compiled for."""
        too_long = shorten if self.shorten_prompts else refuse
        return Shapes(
            self.context,
            self.completion,
            self.rows,
            self.rows_per_chunk,
            self.tokens_per_chunk,
            too_long=too_long,
            teacher_context=self.teacher_context,
            lengths=self.lengths,
        )

    def experiment(
        self, *, method: Method, task: Task, student: Pretrained | None = None, **changes: Any
    ) -> Experiment:
        """The experiment that these settings describe; `changes` replace fields of `Experiment`.

        The student is `model`, loaded here after all that can be refused before, unless it is given.
        """
        own = self.chosen_teachers()
        task = judges.judged(task, self.chosen_judge())
        check_answers(task, method)
        teachers.check_before_loading(task, own, told=self.lesson == "solution")
        same = ("steps", "prompts", "rounds", "minibatches", "epochs", "seed", "memory", "remat", "scan")
        same += ("evaluation", "evaluate_every", "save_every", "keep", "keep_every", "keep_best", "grace")
        same += ("log_project", "completions_every", "stop_on")
        chosen = {
            **{name: getattr(self, name) for name in same},
            "log": tuple(trackers.chosen(self.log)),
            "optimizer": self.chosen_optimizer(),
            "shapes": self.shapes(),
            "dtype": jnp.bfloat16 if self.bf16 else jnp.float32,
            "router": routers.chosen(self.router_aux, self.router_z),
            "params_dtype": jnp.dtype(self.params_dtype),
            "lora": adapters.chosen(self.lora_rank, self.lora_base, self.lora_experts),
            "export_dtype": None if self.export_dtype == "original" else self.export_dtype,
            "mesh": mesh_shape(self.mesh),
            "student": self.student() if student is None else student,
        }
        if own.models:
            dtype = self.teacher_dtype and jnp.dtype(self.teacher_dtype)
            file = self.chat_template or None
            loaded = teachers.load(own, chosen["student"], dtype=dtype, chat_template=file)
            chosen |= {"teachers": loaded, "teacher_dtype": dtype}
        return Experiment(method=method, task=task, **(chosen | changes))


def check_answers(task: Task, method: Method) -> None:
    """Raises: `TaskError` where rewards are to be learned from and problems have no answer, before anything is loaded."""
    missing = task.read.get("train", {}).get("unanswered", 0)
    compared = task.verify in (maths.verify, exact.verify)
    if missing and compared and any(objective.rewarded for objective in method.objectives):
        raise TaskError(
            f"{missing} problems of {task.name} have no answer, and this method learns from rewards: name the column with "
            "--fields answer=COLUMN, let a model judge (--judge), or imitate the texts with --method sft."
        )
