//! JSON Schemas, made from the types; `proto/schema/` holds them as files.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::Value;

use crate::{Event, JobResult, JobSpec};

fn schema_of<T: JsonSchema>() -> Value {
    SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>().to_value()
}

/// The JSON Schema (draft 2020-12) of a [`JobSpec`].
#[must_use]
pub fn job_spec() -> Value {
    let mut schema = schema_of::<JobSpec>();
    // The default is a new id each time: no value to show.
    if let Some(id) = schema.pointer_mut("/properties/id").and_then(Value::as_object_mut) {
        id.remove("default");
    }
    schema
}

/// The JSON Schema of a [`JobResult`].
#[must_use]
pub fn job_result() -> Value {
    schema_of::<JobResult>()
}

/// The JSON Schema of an [`Event`].
#[must_use]
pub fn event() -> Value {
    schema_of::<Event>()
}
