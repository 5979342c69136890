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
                let line = format!("{path} = {}", literal(&value.kind));
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
