"""What this host's backends can enforce, and the strongest of them for given limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agentrl.errors import AgentRLError, BadConfig, MissingExtra
from agentrl.registry import list_sandboxes, make_sandbox
from agentrl.sandbox import Backend, Limits, Survey, check_enforced

__all__ = ["INSTALL", "strongest", "survey_all"]

# What a backend needs from whoever runs this host.
INSTALL: Mapping[str, str] = {
    "docker": 'pip install "agentrl-gym[docker]", a running Docker engine, and an image with python3 '
    "(AGENTRL_DOCKER_IMAGE); gVisor: install runsc and run 'runsc install'",
    "zygote": "Linux as root, or with unprivileged user namespaces "
    "(sysctl kernel.unprivileged_userns_clone=1) and a delegated cgroup "
    "(systemd-run --user --scope -p Delegate=yes)",
    "bubblewrap": "apt install bubblewrap (dnf install bubblewrap), and a cgroup of one's own: root, or "
    "systemd-run --user --scope -p Delegate=yes",
    "process": "nothing: for trusted code only, and only where it is asked for by name",
}


def survey_all() -> Mapping[str, Survey]:
    """What each backend of this installation says of this host, by its name."""
    return {name: _surveyed(name) for name in list_sandboxes()}


def _surveyed(name: str) -> Survey:
    try:
        backend = make_sandbox(name)
        try:
            return backend.survey()
        finally:
            backend.close()
    except MissingExtra as error:
        return Survey(available=False, note=str(error))
    # A third party's backend may fail in any way, and the others are to be told of.
    except Exception as error:
        return Survey(available=False, note=f"it fails: {type(error).__name__}: {error}")


def strongest(limits: Limits) -> Backend:
    """The strongest backend here that enforces all of ``limits`` and every guarantee, made anew.

    In this order: docker with gVisor, zygote, bubblewrap, docker; ``process`` never. Raises BadConfig.
    """
    reasons: dict[str, str] = {}
    for name, make in _CANDIDATES:
        try:
            backend = make()
        except (MissingExtra, BadConfig) as error:
            reasons[name] = str(error)
            continue
        try:
            check_enforced(name, backend.survey(), limits)
        except AgentRLError as error:
            backend.close()
            reasons[name] = str(error)
        else:
            return backend
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BadConfig(
        f"no sandbox here enforces what is asked for ({told}). Install one: bubblewrap: "
        f"{INSTALL['bubblewrap']}; docker: {INSTALL['docker']}; or ask for less, and see "
        "'agentrl sandbox doctor'"
    )


_CANDIDATES: tuple[tuple[str, Callable[[], Backend]], ...] = (
    ("docker with gVisor", lambda: make_sandbox("docker", runtime="runsc")),
    ("zygote", lambda: make_sandbox("zygote")),
    ("bubblewrap", lambda: make_sandbox("bubblewrap")),
    ("docker", lambda: make_sandbox("docker")),
)
