"""Settings of `circuit-breakers serve`: flags, then CIRCUIT_BREAKERS_* variables, then defaults.

Parsed once at the edge and passed down. Importing this module is light.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from circuit_breakers.errors import ConfigError

__all__ = ["ENV_PREFIX", "ServeSettings", "load_settings"]

ENV_PREFIX = "CIRCUIT_BREAKERS_"

_DEFAULT_PORT = 8000


class ServeSettings(BaseSettings):
    """What one server process runs with."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    model: Annotated[str, Field(min_length=1)] = "smollm2-135m-instruct"
    """Built-in name, local directory or hub id of the base model."""
    revision: str | None = None
    """Hub branch, tag or commit of the base model; hub ids only."""
    breaker: Path | None = None
    """Directory of the breaker artifact; None takes the one that ships for a built-in model."""
    served_name: str | None = None
    """Name that clients pass as `model`; None takes the name of the base model."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: Annotated[int, Field(ge=0, le=65535)] = _DEFAULT_PORT
    """TCP port; 0 takes a free one and says which."""

    mode: Literal["observe", "enforce"] = "enforce"
    """observe reports trips and never stops a request; enforce stops it."""
    adapter: Literal["merged", "dynamic"] = "merged"
    """merged bakes the adapter into the weights at load; dynamic runs it as a LoRA, slower."""
    target_fpr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of benign conversations that may trip, at most: takes the lowest thresholds that the
    breaker's calibration proves it for, and refuses to start when there are none. None takes the
    promise that the breaker was exported with."""
    loras: dict[str, Path] = {}
    """LoRA adapters of the operator's own on top of the merged breaker, by the name that clients
    pass as `model`. The thresholds were calibrated without them."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto takes the checkpoint's, and float32 on
    a CPU without AVX-512, which is several times slower at 16-bit types."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt plus completion, in tokens; None takes the model's."""
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Requests that run at once, further ones wait; None lets vLLM choose."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens fed in one engine step; longer prompts are fed in chunks. None lets vLLM choose."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Ranks that share each layer of the model."""
    pipeline_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Ranks that share the stack of layers."""
    data_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Whole engines behind this one server."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 2
    """Memory of the KV cache on a CPU, in GiB; a GPU sizes its own."""
    enforce_eager: bool = True
    """No compilation: starts in seconds instead of minutes, runs about a fifth slower on a CPU."""
    seed: int = 0
    """Seed of the engine's sampler."""

    policies: Path | None = None
    """TOML file with named policies and API keys, read again on SIGHUP; None serves everybody
    under `mode` and `target_fpr`."""
    pepper_file: Path | None = None
    """File with the secret that API keys are hashed with; CIRCUIT_BREAKERS_PEPPER instead of it."""
    console: bool = False
    """Whether the process makes an admin key for /console, prints it once beside the line that says
    ready, and forgets it with its end. Nobody else needs a key for that."""

    tool_call_parser: str | None = None
    """vLLM's parser for the model's tool calls, e.g. hermes; None refuses requests with tools."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 1024 * 1024
    """Largest request body, in bytes; a larger one is refused with 413."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30
    """Seconds that a client may take to send a body (408), to send a head, or to take what it is
    sent (the connection ends)."""
    max_choices: Annotated[int, Field(ge=1)] = 16
    """Largest number of completions that one request may ask for: prompts times `n`."""
    azure_annotations: bool = False
    """Azure's content_filter_results in the answers of chat completions and completions, too."""
    max_concurrent_requests: Annotated[int, Field(ge=1)] = 1024
    """Requests that run at once; further ones wait. vLLM's largest default batch."""
    max_queued_requests: Annotated[int, Field(ge=0)] = 256
    """Requests that wait; a further one is refused with 503."""
    max_concurrent_requests_per_key: Annotated[int, Field(ge=1)] | None = None
    """Requests of one key that run at once; further ones wait. None is no limit of its own."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Rate of one key, and how many may come at once after a quiet minute; a further one is
    refused with 429. None is no limit."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 1800
    """Seconds from a request's arrival to the end of its answer; then it is ended with 504, or
    with an error event in its stream. Waiting counts."""
    drain_delay_s: Annotated[float, Field(ge=0)] = 0
    """Seconds after SIGTERM in which requests are still taken while /readyz already fails, for
    load balancers to notice."""
    shutdown_timeout_s: Annotated[int, Field(ge=0)] = 25
    """Seconds from the end of the drain delay to the end of the process; Kubernetes gives 30 for
    both. Running requests have them less 5, in which the engine stops; those that last longer end
    with an error."""
    audit_db: Path | None = None
    """SQLite file of the audit log, made if it is missing; None keeps no log, as a record of who
    tripped when, and for how long it is kept, is the operator's to decide."""
    audit_url: SecretStr | None = None
    """Database of the audit log instead, e.g. postgresql://USER@HOST/DATABASE. Several servers may
    write to one. A password belongs into the variable, not onto the command line."""
    audit_spool: Path | None = None
    """Folder where entries of the audit log wait while its database is away; should outlive the
    process. None takes one beside the SQLite file."""
    audit_key_file: Path | None = None
    """File with a key of at least 32 bytes that signs each row of the audit log."""
    score_traces: bool = False
    """Whether each request's highest scores are kept beside the audit log, for `replay`."""
    trace_days: Annotated[int, Field(ge=1)] = 30
    """Days that score traces are kept."""
    canary_interval_s: Annotated[float, Field(ge=0)] = 300
    """Seconds between two runs of the breaker's canaries; when one fails, the server is not ready
    until they pass again. 0 runs them at the start only."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least severe messages that are logged, the engine's included."""
    log_format: Literal["text", "json"] = "text"
    """json: one object a line on standard error, the engine's records included, and one for each
    request that ended. Neither holds text of a prompt or an answer."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector that takes OTLP over HTTP, e.g. http://localhost:4318, for
    a span of each request with the guard's verdict; None sends nothing."""

    @property
    def model_name(self) -> str:
        """The name that clients pass as `model`."""
        # A directory is served under its own name; its parents are nobody's business.
        is_path = Path(self.model).expanduser().is_dir()
        return self.served_name or (Path(self.model).resolve().name if is_path else self.model)

    @field_validator("loras", mode="before")
    @classmethod
    def _from_pairs(cls, value: Any) -> Any:
        # The flag gives NAME=DIR pairs, the variable a JSON object.
        if not isinstance(value, list):
            return value
        for pair in value:
            if not all(pair.partition("=")):
                raise ValueError(f"got {pair!r}, expected NAME=DIR")
        return {name: path for name, _, path in (pair.partition("=") for pair in value)}

    @field_validator("port", mode="before")
    @classmethod
    def _ignore_service_links(cls, value: Any) -> Any:
        # Kubernetes gives every pod CIRCUIT_BREAKERS_PORT=tcp://... when a service is named
        # circuit-breakers; nobody asked for a port there.
        if isinstance(value, str) and value.startswith("tcp://"):
            return _DEFAULT_PORT
        return value


def load_settings(**flags: Any) -> ServeSettings:
    """Settings from the flags that were given (None means not given) and the environment.

    Raises:
        ConfigError: naming every setting that is out of range or unknown, with its variable.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return ServeSettings(**given)
    except ValidationError as e:
        problems = "; ".join(_describe(error, given) for error in e.errors()[:5])
        raise ConfigError(f"settings do not fit: {problems}") from e


def _describe(error: Any, given: dict[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else "settings"
    flag = f"--{name.replace('_', '-')}"
    source = flag if name in given else f"{ENV_PREFIX}{name.upper()}"
    return f"{source}: got {error['input']!r}, {error['msg'].lower()}; see {flag} in --help"
