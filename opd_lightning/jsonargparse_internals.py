"""All private names of jsonargparse that this package uses: look here first when another release of it is allowed."""

from jsonargparse._loaders_dumpers import get_loader_exceptions, get_yaml_default_loader, yaml_load
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._typehints import get_all_subclass_paths, type_to_str
from jsonargparse._util import import_object

__all__ = [
    "get_all_subclass_paths",
    "get_loader_exceptions",
    "get_signature_parameters",
    "get_yaml_default_loader",
    "import_object",
    "type_to_str",
    "yaml_load",
]
