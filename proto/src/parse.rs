//! From bytes to a valid [`JobSpec`]: cap, parse, check.
//!
//! The parser stops at the first thing that is wrong. What it says of types is in the words of its own language;
//! [`in_words`] says it in those of JSON (RFC 8259).

use serde::de::DeserializeOwned;

use crate::object::Object;
use crate::{JobSpec, MAX_SPEC_BYTES, Problem, SpecError};

/// The most characters of a wrong value that are repeated in an error.
const SHOWN: usize = 80;

impl JobSpec {
    /// Parses and validates a job from its JSON.
    ///
    /// # Errors
    /// [`SpecError::NotJson`] for what is not JSON; [`SpecError::Invalid`] for all else, with the
    /// path of each field that is wrong.
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        if json.len() > MAX_SPEC_BYTES {
            return Err(SpecError::Invalid(vec![Problem::new(
                "",
                format!(
                    "the spec has {} bytes, at most {MAX_SPEC_BYTES} are read; put large content in blobs",
                    json.len()
                ),
            )]));
        }
        let Object(spec): Object<Self> = object(json)?;
        spec.validate()?;
        Ok(spec)
    }
}

/// One value from its JSON, and nothing behind it.
pub(crate) fn object<T: DeserializeOwned>(json: &[u8]) -> Result<T, SpecError> {
    let json = str::from_utf8(json)?;
    let mut parser = serde_json::Deserializer::from_str(json);
    let value = serde_path_to_error::deserialize(&mut parser).map_err(|error| describe(json, &error))?;
    parser.end().map_err(|error| SpecError::NotJson(error.to_string()))?;
    Ok(value)
}

/// A parser's error as a sentence with the path of the field.
fn describe(json: &str, error: &serde_path_to_error::Error<serde_json::Error>) -> SpecError {
    let inner = error.inner();
    let not_json = !inner.is_data() && serde_json::from_str::<serde::de::IgnoredAny>(json).is_err();
    if not_json {
        return SpecError::NotJson(inner.to_string());
    }
    let path = error.path().to_string();
    SpecError::Invalid(vec![Problem::new(if path == "." { "" } else { &path }, in_words(inner))])
}

/// What is expected, and what is there, in the words of JSON. The path says where.
fn in_words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let text = text.strip_suffix(&place).unwrap_or(&text);
    // The parser says so where one of a few words may stand, and there is neither text nor an object.
    if text == "expected value" {
        return "a string is expected".to_owned();
    }
    let mismatch = ["invalid type: ", "invalid value: "].iter().find_map(|kind| text.strip_prefix(kind));
    // A text that is there may have the same words in it: the last are the parser's.
    match mismatch.and_then(|rest| rest.rsplit_once(", expected ")) {
        Some((found, expected)) => format!("{} is expected, not {}", wanted(expected), there(found)),
        None => text.to_owned(),
    }
}

fn wanted(expected: &str) -> &str {
    match expected {
        // Of a spec the priority alone has this type, and the attempts alone the next.
        "u8" => "a whole number from 0 to 31",
        "u32" => "a whole number from 1 to 100",
        "u64" => "a whole number from 0 on",
        "a boolean" => "true or false",
        "a sequence" => "an array",
        other => other,
    }
}

fn there(found: &str) -> String {
    match found {
        "sequence" => "an array".to_owned(),
        "map" => "an object".to_owned(),
        "null" => "null".to_owned(),
        _ => {
            let value = ["string ", "integer ", "floating point ", "boolean "]
                .iter()
                .find_map(|kind| found.strip_prefix(kind))
                .unwrap_or(found);
            let shown: String = value.chars().take(SHOWN).collect();
            if shown.len() < value.len() { shown + "…" } else { shown }
        }
    }
}
