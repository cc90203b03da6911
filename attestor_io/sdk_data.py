"""Sessions of botocore that load the SDK's own data, and nobody else's code; imports the SDK."""

from __future__ import annotations

import json
from typing import Any

from botocore.hooks import HierarchicalEmitter
from botocore.loaders import JSONFileLoader, Loader
from botocore.session import Session


class _FileLoader(JSONFileLoader):
    def load_file(self, file_path: str) -> Any:
        try:
            with open(f"{file_path}.json", "rb") as source:
                return json.load(source)
        except FileNotFoundError:  # or it is compressed, or not there at all
            return super().load_file(file_path)


class _Handlers(HierarchicalEmitter):
    def _verify_accept_kwargs(self, func: object) -> None:
        """Take the SDK's 131 handlers as they are: to look at each costs 1 % of a start."""


def new_session() -> Any:
    """A botocore session that loads the SDK's own data alone, runs no plugin, and reports nothing.

    `BOTOCORE_EXPERIMENTAL__PLUGINS` names modules that would be imported, and get each client.
    Client-side monitoring (`AWS_CSM_ENABLED`, or a profile's `csm_enabled`) would send the session
    token with each call, in the clear, to a host that the environment names.
    """
    session: Any = Session(event_hooks=_Handlers())
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
    # besides KMS, where ciphertexts are kept, and what a source of credentials may call
    services = "kms s3 secretsmanager ssm sts sso sso-oidc signin".split()
    data.list_available_services = lambda type_name: services  # noqa: ARG005
    return data
