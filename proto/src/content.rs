//! Bytes in a spec: as text, as base64, or by the digest of a blob.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::object::Object;

/// Bytes given in a spec: exactly one of `text`, `base64`, `blob`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Object<RawContent>", into = "RawContent")]
#[schemars(with = "RawContent")]
pub enum Content {
    /// Bytes that were given in place, as text or base64.
    Inline(Vec<u8>),
    /// Bytes kept in the blob store.
    Blob(Digest),
}

impl Content {
    /// Content with these bytes.
    pub fn inline(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Inline(bytes.into())
    }
}

/// The wire form of [`Content`]: one of `text`, `base64`, `blob`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Content", extend("minProperties" = 1, "maxProperties" = 1))]
struct RawContent {
    /// The bytes as UTF-8 text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// The bytes in standard base64 with padding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    /// The digest of a blob that was uploaded before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blob: Option<Digest>,
}

/// The three wire fields of a content, of which one is given.
type Parts = (Option<String>, Option<String>, Option<Digest>);

impl Content {
    /// The content given by exactly one of `text`, `base64`, `blob`.
    pub(crate) fn from_parts(
        text: Option<String>,
        base64: Option<String>,
        blob: Option<Digest>,
    ) -> Result<Self, String> {
        match (text, base64, blob) {
            (Some(text), None, None) => Ok(Self::Inline(text.into_bytes())),
            (None, Some(encoded), None) => STANDARD
                .decode(encoded)
                .map(Self::Inline)
                .map_err(|e| format!("`base64` is not standard base64 with padding: {e}")),
            (None, None, Some(digest)) => Ok(Self::Blob(digest)),
            (None, None, None) => Err("one of `text`, `base64`, `blob` is needed".to_owned()),
            _ => Err("only one of `text`, `base64`, `blob` may be given".to_owned()),
        }
    }

    /// The wire fields `text`, `base64`, `blob`; bytes that are not UTF-8 go as base64.
    pub(crate) fn into_parts(self) -> Parts {
        match self {
            Self::Inline(bytes) => match String::from_utf8(bytes) {
                Ok(text) => (Some(text), None, None),
                Err(e) => (None, Some(STANDARD.encode(e.as_bytes())), None),
            },
            Self::Blob(digest) => (None, None, Some(digest)),
        }
    }
}

impl TryFrom<Object<RawContent>> for Content {
    type Error = String;

    fn try_from(Object(raw): Object<RawContent>) -> Result<Self, String> {
        Self::from_parts(raw.text, raw.base64, raw.blob)
    }
}

impl From<Content> for RawContent {
    fn from(content: Content) -> Self {
        let (text, base64, blob) = content.into_parts();
        Self { text, base64, blob }
    }
}
