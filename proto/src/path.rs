//! Paths and modes inside a sandbox.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// An absolute path inside the sandbox: no `..`, no NUL, at most 4,095 bytes, parts of at most 255.
///
/// It is kept in its simplest form (`/a//b/./c/` becomes `/a/b/c`), so two equal places are equal.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobPath(String);

impl JobPath {
    /// The path as text, always starting with `/`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is `/` itself.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.0 == "/"
    }

    /// Whether this is `dir` or lies below it.
    #[must_use]
    pub fn is_within(&self, dir: &str) -> bool {
        self.0 == dir || self.0.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
    }
}

impl TryFrom<String> for JobPath {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if !text.starts_with('/') {
            return Err("an absolute path is expected, such as /box/main.py".to_owned());
        }
        if text.len() > 4095 {
            return Err(format!("a path may have 4095 bytes, this one has {}", text.len()));
        }
        if text.contains('\0') {
            return Err("a path may not contain a NUL byte".to_owned());
        }
        let mut clean = String::with_capacity(text.len());
        for part in text.split('/').filter(|part| !part.is_empty() && *part != ".") {
            if part == ".." {
                return Err("a path may not contain `..`".to_owned());
            }
            if part.len() > 255 {
                return Err(format!("a part of a path may have 255 bytes, one has {}", part.len()));
            }
            clean.push('/');
            clean.push_str(part);
        }
        if clean.is_empty() {
            clean.push('/');
        }
        Ok(Self(clean))
    }
}

impl From<JobPath> for String {
    fn from(path: JobPath) -> Self {
        path.0
    }
}

impl fmt::Display for JobPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for JobPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl JsonSchema for JobPath {
    fn schema_name() -> Cow<'static, str> {
        "JobPath".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^/",
            "maxLength": 4095,
            "description": "an absolute path inside the sandbox, without `..`"
        })
    }
}

/// Permission bits of a file, as octal text: `"0644"`. Set-user-ID and the like are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mode(u32);

impl Mode {
    /// `0644`.
    pub const FILE: Self = Self(0o644);

    /// The mode with these bits; all but the permission bits are dropped.
    #[must_use]
    pub fn from_bits(bits: u32) -> Self {
        Self(bits & 0o7777)
    }

    /// The bits, as of chmod(2).
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }
}

impl Default for Mode {
    fn default() -> Self {
        Self::FILE
    }
}

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let valid = matches!(text.len(), 3..=5) && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
        match u32::from_str_radix(&text, 8) {
            Ok(bits) if valid && bits <= 0o7777 => Ok(Self(bits)),
            _ => Err("a mode is octal text such as \"0644\" or \"0755\"".to_owned()),
        }
    }
}

impl From<Mode> for String {
    fn from(mode: Mode) -> Self {
        format!("{:04o}", mode.0)
    }
}

impl JsonSchema for Mode {
    fn schema_name() -> Cow<'static, str> {
        "Mode".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^[0-7]{3,5}$"})
    }
}
