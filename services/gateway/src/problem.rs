//! What is said when something cannot be done: `application/problem+json` (RFC 9457).

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hutch_layers::StoreError;
use hutch_proto::SpecError;
use hutch_queue::QueueError;
use serde_json::{Value, json};

/// One refusal.
#[derive(Debug)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    kind: &'static str,
    title: &'static str,
    pub(crate) detail: String,
    fields: Vec<hutch_proto::Problem>,
}

impl Problem {
    fn new(status: StatusCode, kind: &'static str, title: &'static str, detail: impl Into<String>) -> Self {
        Self { status, kind, title, detail: detail.into(), fields: Vec::new() }
    }

    pub(crate) fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", "The request is not understood", detail)
    }

    /// `given`: something was, and is no token of ours.
    pub(crate) fn unauthorized(given: bool) -> Self {
        let detail = match given {
            true => "`Authorization` names no token that this gateway knows: `Bearer TOKEN` is expected",
            false => "a token is needed: `Authorization: Bearer TOKEN`",
        };
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "No token that is known", detail)
    }

    pub(crate) fn forbidden(detail: String) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", "This is not allowed", detail)
    }

    pub(crate) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", "There is no such thing", detail)
    }

    pub(crate) fn method_not_allowed() -> Self {
        let detail = "this is there, but not for this method; the header `allow` names those that are";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "Not with this method", detail)
    }

    pub(crate) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", "Not in this state", detail)
    }

    pub(crate) fn too_large(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "The body is too large", detail)
    }

    pub(crate) fn spec_invalid(fields: Vec<hutch_proto::Problem>) -> Self {
        let lines: Vec<String> = fields.iter().map(ToString::to_string).collect();
        let problem = Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "spec_invalid",
            "The spec is wrong",
            lines.join("; "),
        );
        Self { fields, ..problem }
    }

    fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "Not now; try again", detail)
    }

    pub(crate) fn internal(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "The gateway failed", detail)
    }

    /// The body.
    pub(crate) fn to_json(&self) -> Value {
        let fields: Vec<Value> =
            self.fields.iter().map(|field| json!({"path": field.path, "message": field.message})).collect();
        json!({
            "type": format!("urn:hutch:problem:{}", self.kind),
            "title": self.title,
            "status": self.status.as_u16(),
            "detail": self.detail,
            "problems": fields,
        })
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::warn!(status = self.status.as_u16(), detail = self.detail, "a request failed");
        }
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

impl From<SpecError> for Problem {
    fn from(error: SpecError) -> Self {
        match error {
            SpecError::NotJson(message) => {
                Self::new(StatusCode::BAD_REQUEST, "not_json", "The body is not JSON", message)
            }
            SpecError::Invalid(problems) => Self::spec_invalid(problems),
        }
    }
}

impl From<QueueError> for Problem {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Unavailable(_) | QueueError::Closed => Self::unavailable(error.to_string()),
            QueueError::Fenced(_) | QueueError::Setup(_) => Self::internal(error.to_string()),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::NotFound(_) => Self::not_found(error.to_string()),
            StoreError::TooLarge { .. } => Self::too_large(error.to_string()),
            StoreError::Damaged { .. }
            | StoreError::Url { .. }
            | StoreError::Record { .. }
            | StoreError::Image(_)
            | StoreError::Registry { .. } => Self::internal(error.full()),
            StoreError::Object { .. } | StoreError::Transfer { .. } | StoreError::Directory { .. } => {
                Self::unavailable(error.full())
            }
        }
    }
}
