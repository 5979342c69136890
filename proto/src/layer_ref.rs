//! How a job names one of its layers.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::{Digest, JobId};

/// One layer of a job's file system, base first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LayerRef {
    /// `sha256:<hex>`: a stored layer, by the digest of its uncompressed tar (an OCI diff id).
    Stored(Digest),
    /// `image:<reference>`: an OCI image, expanded to its layers.
    Image(String),
    /// `job:<id>`: the layer that an earlier job committed.
    Job(JobId),
    /// `dir:<path>`: a directory of the worker's host, under a path that its config allows.
    Dir(String),
    /// `host`: the host's own programs and libraries, copy-on-write; only as the bottom layer.
    Host,
}

impl FromStr for LayerRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('\0') {
            return Err("a layer may not contain a NUL byte".to_owned());
        }
        if text.len() > 4200 {
            return Err(format!("a layer reference may have 4200 bytes, this one has {}", text.len()));
        }
        if text == "host" {
            return Ok(Self::Host);
        }
        match text.split_once(':') {
            Some(("sha256", _)) => text.parse().map(Self::Stored).map_err(|e: crate::IdError| e.to_string()),
            Some(("image", "")) => {
                Err("`image:` needs a reference, such as image:docker.io/library/python:3.12".to_owned())
            }
            Some(("image", reference)) => Ok(Self::Image(reference.to_owned())),
            Some(("job", id)) => id.parse().map(Self::Job).map_err(|e: crate::IdError| e.to_string()),
            Some(("dir", path)) if path.starts_with('/') => {
                if path.split('/').any(|part| part == "..") {
                    return Err("the path of a `dir:` layer may not contain `..`".to_owned());
                }
                Ok(Self::Dir(path.to_owned()))
            }
            Some(("dir", _)) => Err("`dir:` needs an absolute path, such as dir:/srv/layers/base".to_owned()),
            _ => Err(format!(
                "`{}` is not a layer: `sha256:<hex>`, `image:<reference>`, `job:<id>`, `dir:<path>` or `host` is expected",
                text.chars().take(80).flat_map(char::escape_default).collect::<String>()
            )),
        }
    }
}

impl TryFrom<String> for LayerRef {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<LayerRef> for String {
    fn from(layer: LayerRef) -> Self {
        layer.to_string()
    }
}

impl fmt::Display for LayerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stored(digest) => write!(f, "{digest}"),
            Self::Image(reference) => write!(f, "image:{reference}"),
            Self::Job(id) => write!(f, "job:{id}"),
            Self::Dir(path) => write!(f, "dir:{path}"),
            Self::Host => f.write_str("host"),
        }
    }
}

impl JsonSchema for LayerRef {
    fn schema_name() -> Cow<'static, str> {
        "LayerRef".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(host|sha256:[0-9a-f]{64}|image:.+|job:[0-9a-fA-F-]{36}|dir:/.*)$",
            "description": "`sha256:<hex>`, `image:<reference>`, `job:<id>`, `dir:<path>` or `host`"
        })
    }
}
