//! `hutch config show`: what is in force, and where each value comes from.

use std::fmt::Write as _;

use config::ValueKind;

use super::{Loaded, keys, source};

/// One line for each key that is set, then those that are not; valid TOML as it stands.
pub(crate) fn show(loaded: &Loaded) -> String {
    let mut text = match &loaded.file {
        Some(file) => format!("# config file: {}\n", file.display()),
        None => format!("# no config file: {} are not there\n", super::PLACES.join(" and ")),
    };
    let about = |path: &str| keys::KEYS.iter().find(|key| key.path == path).map(|key| key.about);
    for path in keys::all() {
        match source::value(&loaded.merged, &path) {
            Some(value) => {
                let origin = value.origin().unwrap_or("default").to_owned();
                let line = format!("{path} = {}", literal(&shown(&path, &value.kind)));
                let _ = writeln!(text, "{line:<58} # {}", source_of(&origin));
            }
            None => {
                if let Some(about) = about(&path) {
                    let line = format!("# {path} =");
                    let _ = writeln!(text, "{line:<58} # not set: {about}");
                }
            }
        }
    }
    text.push_str("# worker.default_limits.* and worker.max_limits.*: any limit of a spec, such as\n");
    text.push_str("# worker.max_limits.memory_bytes = \"4GiB\"\n");
    text
}

/// A value as it may be shown: what is printed here ends up in tickets and logs.
fn shown(path: &str, kind: &ValueKind) -> ValueKind {
    match kind {
        ValueKind::String(url) if path.ends_with(".url") => ValueKind::String(masked(url)),
        other => other.clone(),
    }
}

/// An address without its password (RFC 3986, section 3.2.1).
pub(super) fn masked(url: &str) -> String {
    let begin = url.find("://").map_or(0, |at| at + 3);
    let (scheme, rest) = url.split_at(begin);
    // A password may have a `/` that should have been escaped: the last `@` ends it all the same.
    let Some((user, host)) = rest.rsplit_once('@') else { return url.to_owned() };
    match user.split_once(':') {
        Some((name, _)) => format!("{scheme}{name}:***@{host}"),
        None => url.to_owned(),
    }
}

/// A file's origin is its path; the others say what they are.
fn source_of(origin: &str) -> String {
    if origin == "default" || origin.starts_with("env ") || origin.starts_with("flag ") {
        origin.to_owned()
    } else {
        format!("file {origin}")
    }
}

/// A value as TOML.
fn literal(kind: &ValueKind) -> String {
    match kind {
        ValueKind::String(text) => toml::Value::String(text.clone()).to_string(),
        ValueKind::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| literal(&item.kind)).collect();
            format!("[{}]", items.join(", "))
        }
        other => other.to_string(),
    }
}
