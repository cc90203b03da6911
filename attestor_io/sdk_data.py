"""Sessions of botocore that load the SDK's own data, and nobody else's code; imports the SDK."""

from __future__ import annotations

import json
from typing import Any, Final

from attestor_io.sdk_import import HierarchicalEmitter, JSONFileLoader, Loader, Session, handlers

_SERVICES: Final = "kms s3 secretsmanager ssm sts sso sso-oidc signin".split()
"""Besides KMS, where ciphertexts are kept, and what a source of credentials may call."""
_EVENTS_OF: Final = {"", "*", "secrets-manager", *_SERVICES}
"""What an event names after its stage: a service, by its hyphenated id; all of them; or nothing."""


class _FileLoader(JSONFileLoader):
    def load_file(self, file_path: str) -> Any:
        try:
            with open(f"{file_path}.json", "rb") as source:
                return json.load(source)
        except FileNotFoundError:  # or it is compressed, or not there at all
            return super().load_file(file_path)


class _Handlers(HierarchicalEmitter):
    def _verify_accept_kwargs(self, func: object) -> None:
        """Take the SDK's handlers as they are: to look at each costs 1 % of a start."""


class _Session(Session):
    def _register_builtin_handlers(self, events: Any) -> None:
        """Of the SDK's 131 handlers those of our services: to rename them all takes 4 %."""
        events = self._original_handler  # type: ignore[attr-defined] # no name of these is an alias
        register = {
            (): events.register,
            (handlers.REGISTER_FIRST,): events.register_first,
            (handlers.REGISTER_LAST,): events.register_last,
        }
        for event_name, handler, *place in handlers.BUILTIN_HANDLERS:
            stage, service = f"{event_name}..".split(".")[:2]
            if stage != "docs" and service in _EVENTS_OF:
                register[tuple(place)](event_name, handler)


def new_session() -> Any:
    """A botocore session that loads the SDK's own data alone, runs no plugin, and reports nothing.

    `BOTOCORE_EXPERIMENTAL__PLUGINS` names modules that would be imported, and get each client.
    Client-side monitoring (`AWS_CSM_ENABLED`, or a profile's `csm_enabled`) would send the session
    token with each call, in the clear, to a host that the environment names.
    """
    session: Any = _Session(event_hooks=_Handlers())
    session.register_component("data_loader", _loader())
    session.set_config_variable("csm_enabled", False)  # comes before environment and profile
    session._register_client_plugins = lambda client: None  # noqa: ARG005
    return session


def _loader() -> Any:
    """A loader for a botocore session, in half the time and memory of its own.

    It neither walks over some 400 folders to list the services, nor makes an OrderedDict of each
    object in the megabyte of endpoints: a dict keeps its order as well.
    """
    # the SDK's own folder alone: ~/.aws/models and AWS_DATA_PATH could lead KMS's name elsewhere
    data: Any = Loader(
        [Loader.BUILTIN_DATA_PATH], _FileLoader(), include_default_search_paths=False
    )
    data.list_available_services = lambda type_name: _SERVICES  # noqa: ARG005
    return data
