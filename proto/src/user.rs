//! Whom a job's program runs as.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The highest uid or gid that exists in a sandbox: its user namespace maps 0..=65534.
pub const MAX_ID: u32 = 65_534;

/// `name`, `uid`, `uid:gid` or `name:group`, to be looked up in the sandbox's own `/etc/passwd`
/// and `/etc/group` (passwd(5), group(5)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UserSpec {
    user: String,
    group: Option<String>,
}

impl UserSpec {
    /// The user's name or number.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The group's name or number, where one was given.
    #[must_use]
    pub fn group(&self) -> Option<&str> {
        self.group.as_deref()
    }
}

impl Default for UserSpec {
    fn default() -> Self {
        Self { user: "1001".to_owned(), group: Some("1001".to_owned()) }
    }
}

fn check(what: &str, text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err(format!("the {what} is empty: `name`, `uid`, `uid:gid` or `name:group` is expected"));
    }
    if text.len() > 64 || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-$".contains(&b)) {
        return Err(format!("the {what} may have 64 letters, digits and `._-$`"));
    }
    if text.starts_with('-') {
        return Err(format!("the {what} may not start with `-`"));
    }
    if text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u32>().map_or(true, |id| id > MAX_ID) {
        return Err(format!("a numeric {what} is 0..={MAX_ID}, not {text}"));
    }
    Ok(())
}

impl TryFrom<String> for UserSpec {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text.as_str(), None),
        };
        check("user", user)?;
        if let Some(group) = group {
            check("group", group)?;
        }
        Ok(Self { user: user.to_owned(), group: group.map(str::to_owned) })
    }
}

impl From<UserSpec> for String {
    fn from(user: UserSpec) -> Self {
        user.to_string()
    }
}

impl fmt::Display for UserSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.user)?;
        self.group.as_ref().map_or(Ok(()), |group| write!(f, ":{group}"))
    }
}

impl JsonSchema for UserSpec {
    fn schema_name() -> Cow<'static, str> {
        "User".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^[A-Za-z0-9._$][A-Za-z0-9._$-]{0,63}(:[A-Za-z0-9._$][A-Za-z0-9._$-]{0,63})?$",
            "description": "`name`, `uid`, `uid:gid` or `name:group`"
        })
    }
}
