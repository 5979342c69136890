//! `GET /openapi.json`: what is served, in the words of OpenAPI 3.1.
//!
//! The schemas are those of the wire types; the paths are written down here, and a test holds them
//! against the routes.

use axum::Json;
use serde_json::{Map, Value, json};

/// `GET /openapi.json`.
pub(crate) async fn show() -> Json<Value> {
    Json(document())
}

/// The document.
pub(crate) fn document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "hutch",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Runs programs that nobody trusts, each in a sandbox of its own.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"token": []}, {}],
        "paths": paths(),
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description":
                "Needed where the gateway has tokens; scopes are submit, read and admin."}},
            "schemas": schemas(),
        },
    })
}

fn paths() -> Value {
    let id =
        json!({"name": "id", "in": "path", "required": true, "schema": {"type": "string", "format": "uuid"}});
    let job = |operations: Value| with(json!({"parameters": [id]}), operations);
    json!({
        "/v1/jobs": {
            "post": op("Submit a job", &[query("wait_ms", "integer", "wait this long for the result")], Some(json_body("JobSpec")),
                &[(200, "the result, if it came in time", Some("JobResult")), (202, "accepted", Some("Accepted")),
                  (400, "not JSON", Some("Problem")), (413, "too large", Some("Problem")),
                  (422, "the spec is wrong", Some("Problem")), (503, "the queue is not available", Some("Problem"))]),
            "get": op("List jobs, newest first", &[
                query("status", "string", "a state (queued, running, finished) or a status (succeeded, failed, …)"),
                query("label", "string", "NAME:VALUE"),
                query("after", "string", "the last id of the page before"),
                query("limit", "integer", "1..=500, 50 if left out")], None,
                &[(200, "a page of jobs; output is cut short", Some("JobList"))]),
        },
        "/v1/jobs/batch": {"post": op("Submit many jobs", &[], Some(json!({"required": true, "content": {"application/json":
                {"schema": {"type": "array", "maxItems": 1000, "items": reference("JobSpec")}}}})),
            &[(202, "an entry for each spec, in order", Some("BatchAnswer"))])},
        "/v1/jobs/{id}": job(json!({
            "get": op("Look a job up", &[], None, &[(200, "the job", Some("JobView")), (404, "not known", Some("Problem"))]),
            "delete": op("Call a job off", &[], None, &[(202, "it is, or will be, cancelled, or had ended already", Some("Cancelled")), (404, "not known", Some("Problem"))]),
        })),
        "/v1/jobs/{id}/events": job(json!({"get": with(op("Follow a job", &[header("Last-Event-ID", "the last event that was seen")], None, &[]),
            json!({"responses": {"200": {"description": "events until the job ends, each an Event with its kind as name",
                "content": {"text/event-stream": {"schema": reference("Event")}}}, "204": {"description": "nothing more to come"}}}))})),
        "/v1/jobs/{id}/exec": job(json!({"get": with(op("Run one more program in a running job, over a WebSocket", &[], None, &[]), exec_responses())})),
        "/v1/jobs/{id}/stdout": job(json!({"get": raw("What the job wrote to stdout, as far as it is kept", "text/plain")})),
        "/v1/jobs/{id}/stderr": job(json!({"get": raw("What the job wrote to stderr, as far as it is kept", "text/plain")})),
        "/v1/jobs/{id}/outputs": job(json!({"get": op("List the files that a job left", &[], None,
            &[(200, "the files", Some("Outputs")), (409, "the job is not finished", Some("Problem"))])})),
        "/v1/jobs/{id}/outputs/{path}": with(job(json!({"get": raw("One file that a job left", "application/octet-stream")})),
            json!({"parameters": [id, {"name": "path", "in": "path", "required": true, "description": "the file's path, slashes and all",
                "schema": {"type": "string"}}]})),
        "/v1/blobs": {"post": op("Upload a blob", &[], Some(json!({"required": true, "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}})),
            &[(201, "it is kept", Some("Blob")), (413, "too large", Some("Problem"))])},
        "/v1/blobs/{digest}": with(json!({"get": raw("Fetch a blob", "application/octet-stream")}),
            json!({"parameters": [{"name": "digest", "in": "path", "required": true, "schema": reference("Digest")}]})),
        "/v1/queues": {"get": op("How many jobs wait and run", &[], None, &[(200, "by queue", Some("Queues"))])},
        "/healthz": {"get": raw("Whether the gateway lives", "text/plain")},
        "/readyz": {"get": raw("Whether the gateway can take jobs; 503 with the reason if not", "text/plain")},
        "/metrics": {"get": raw("Metrics for Prometheus", "text/plain")},
        "/openapi.json": {"get": raw("This document", "application/json")},
        "/": {"get": raw("A page to look at jobs", "text/html")},
    })
}

fn exec_responses() -> Value {
    let problem = |what: &str| json!({"description": what, "content": {"application/problem+json": {"schema": reference("Problem")}}});
    let messages = "messages both ways: a byte that says what it is (0 stdin, 1 stdout, 2 stderr, 3 JSON), and the rest. The \
                    caller begins with 3 and {\"start\": {\"command\": [\"ls\"]}}; the last message is 3 and {\"ended\": {\"exit_code\": 0}}";
    json!({"responses": {
        "101": {"description": messages},
        "400": problem("not a WebSocket"),
        "404": problem("not known"),
        "409": problem("the job does not run"),
    }})
}

fn with(mut value: Value, more: Value) -> Value {
    if let (Some(fields), Value::Object(more)) = (value.as_object_mut(), more) {
        fields.extend(more);
    }
    value
}

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

fn json_body(schema: &str) -> Value {
    json!({"required": true, "content": {"application/json": {"schema": reference(schema)}}})
}

fn query(name: &str, kind: &str, about: &str) -> Value {
    json!({"name": name, "in": "query", "description": about, "schema": {"type": kind}})
}

fn header(name: &str, about: &str) -> Value {
    json!({"name": name, "in": "header", "description": about, "schema": {"type": "string"}})
}

fn raw(summary: &str, kind: &str) -> Value {
    json!({"summary": summary, "responses": {"200": {"description": "as it is", "content": {kind: {}}}}})
}

/// An operation with its answers: status, meaning, schema.
fn op(
    summary: &str,
    parameters: &[Value],
    body: Option<Value>,
    answers: &[(u16, &str, Option<&str>)],
) -> Value {
    let mut responses = Map::new();
    for (status, about, schema) in answers {
        let kind = if *status < 400 { "application/json" } else { "application/problem+json" };
        let content = schema.map(|schema| json!({kind: {"schema": reference(schema)}}));
        let mut response = json!({"description": about});
        if let Some(content) = content {
            response["content"] = content;
        }
        responses.insert(status.to_string(), response);
    }
    let mut operation = json!({"summary": summary, "responses": responses});
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if let Some(body) = body {
        operation["requestBody"] = body;
    }
    operation
}

fn schemas() -> Value {
    let mut schemas = Map::new();
    for (name, schema) in [
        ("JobSpec", hutch_proto::schema::job_spec()),
        ("JobResult", hutch_proto::schema::job_result()),
        ("Event", hutch_proto::schema::event()),
    ] {
        adopt(&mut schemas, name, schema);
    }
    let id = json!({"type": "string", "format": "uuid"});
    let own = [
        ("Accepted", accepted(&id)),
        ("Cancelled", object(json!({"id": id, "outcome": {"enum": ["accepted", "already_finished"]}}))),
        ("Blob", object(json!({"blob": reference("Digest"), "bytes": {"type": "integer"}}))),
        (
            "JobView",
            object(json!({
                "id": id, "state": {"enum": ["queued", "running", "finished"]},
                "submitted_at": {"type": "string", "format": "date-time"},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "result": {"anyOf": [reference("JobResult"), {"type": "null"}]},
            })),
        ),
        (
            "JobList",
            object(json!({
                "jobs": {"type": "array", "items": reference("JobView")},
                "next": {"type": ["string", "null"], "description": "the value of `after` for the next page"},
            })),
        ),
        (
            "BatchAnswer",
            json!({"type": "array", "items": {"anyOf": [reference("Accepted"), object(json!({"problem": reference("Problem")}))]}}),
        ),
        (
            "Queues",
            object(json!({"queues": {"type": "array", "items": object(json!({
            "queue": {"type": "string"}, "queued": {"type": "integer"}, "running": {"type": "integer"}}))}})),
        ),
        (
            "Problem",
            object(json!({
                "type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"}, "detail": {"type": "string"},
                "problems": {"type": "array", "items": object(json!({"path": {"type": "string"}, "message": {"type": "string"}}))},
            })),
        ),
    ];
    schemas.extend(own.into_iter().map(|(name, schema)| (name.to_owned(), schema)));
    Value::Object(schemas)
}

/// `withheld` is there in one case alone.
fn accepted(id: &Value) -> Value {
    let withheld =
        json!({"type": "string", "description": "why the result of a job known before is not shown"});
    with(object(json!({"id": id})), json!({"properties": {"id": id, "withheld": withheld}}))
}

/// An object all of whose fields are there.
fn object(properties: Value) -> Value {
    let required: Vec<&String> =
        properties.as_object().map(|fields| fields.keys().collect()).unwrap_or_default();
    json!({"type": "object", "required": required, "properties": properties})
}

/// Takes a schema in, and the definitions that it brings along.
fn adopt(schemas: &mut Map<String, Value>, name: &str, mut schema: Value) {
    repoint(&mut schema);
    if let Some(fields) = schema.as_object_mut() {
        fields.remove("$schema");
        if let Some(Value::Object(definitions)) = fields.remove("$defs") {
            schemas.extend(definitions);
        }
    }
    schemas.insert(name.to_owned(), schema);
}

/// Points references to definitions of a schema at the components of the document.
fn repoint(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if key == "$ref" => {
                        *text = text.replace("#/$defs/", "#/components/schemas/");
                    }
                    value => repoint(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(repoint),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(text)) = fields.get("$ref") {
                    found.push(text);
                }
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document = document();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 20);
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap_or_else(|| panic!("{reference}"));
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }
}
