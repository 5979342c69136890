//! What is taken from a request, and refused as a problem where it is not as it should be.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use futures::StreamExt;
use futures::stream::BoxStream;
use hutch_proto::JobId;

use crate::problem::Problem;

/// The id in `/v1/jobs/{id}…`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IdInPath(pub(crate) JobId);

impl<S: Send + Sync> FromRequestParts<S> for IdInPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path: Result<Path<HashMap<String, String>>, PathRejection> =
            Path::from_request_parts(parts, state).await;
        let Path(fields) = path.map_err(|error| Problem::bad_request(error.body_text()))?;
        let id = fields.get("id").map_or("", String::as_str);
        id.parse().map(Self).map_err(|error: hutch_proto::IdError| Problem::not_found(error.to_string()))
    }
}

/// The query string, of which every key must be known.
#[derive(Debug, Default)]
pub(crate) struct Query(HashMap<String, String>);

impl Query {
    /// Reads the query of a request; `known` are the keys that it may have.
    pub(crate) fn of(parts: &axum::http::Uri, known: &[&str]) -> Result<Self, Problem> {
        let axum::extract::Query(pairs): axum::extract::Query<Vec<(String, String)>> =
            axum::extract::Query::try_from_uri(parts)
                .map_err(|error| Problem::bad_request(error.body_text()))?;
        let mut fields = HashMap::new();
        for (key, value) in pairs {
            let shown: String = key.chars().take(40).collect();
            if !known.contains(&key.as_str()) {
                return Err(Problem::bad_request(format!(
                    "`{shown}` is not known here; the query may have {}",
                    if known.is_empty() { "nothing".to_owned() } else { known.join(", ") }
                )));
            }
            if fields.insert(key, value).is_some() {
                return Err(Problem::bad_request(format!("`{shown}` is given twice, once is expected")));
            }
        }
        Ok(Self(fields))
    }

    /// A field as it stands; one that is empty counts as left out.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|text| !text.is_empty())
    }

    /// A field that is read by its type; `expected` says what would be right.
    pub(crate) fn field<T: std::str::FromStr>(
        &self,
        key: &str,
        expected: &str,
    ) -> Result<Option<T>, Problem> {
        self.text(key)
            .map(|text| {
                text.parse().map_err(|_| {
                    let shown: String = text.chars().take(80).collect();
                    Problem::bad_request(format!("`{key}={shown}`: {expected} is expected"))
                })
            })
            .transpose()
    }
}

/// How long a body may pause.
const PAUSE: Duration = Duration::from_secs(30);

/// A body as it comes; one that pauses too long breaks off.
pub(crate) fn pieces(body: Body) -> BoxStream<'static, Result<Bytes, io::Error>> {
    tokio_stream::StreamExt::timeout(body.into_data_stream(), PAUSE)
        .map(|piece| match piece {
            Ok(piece) => piece.map_err(io::Error::other),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing came for {PAUSE:?}"))),
        })
        .boxed()
}

/// The whole body, if it is not too large.
pub(crate) async fn whole(body: Body, most: usize, instead: &str) -> Result<Vec<u8>, Problem> {
    let fits = body.size_hint().lower() <= most as u64;
    let mut stream = pieces(body);
    if fits && let Some(whole) = up_to(&mut stream, most).await? {
        return Ok(whole);
    }
    read_away(stream).await;
    Err(Problem::too_large(format!("a body may have {most} bytes here{instead}")))
}

/// What comes, or nothing if that is more.
async fn up_to(
    stream: &mut BoxStream<'static, Result<Bytes, io::Error>>,
    most: usize,
) -> Result<Option<Vec<u8>>, Problem> {
    let mut whole = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| Problem::bad_request(format!("the body broke off: {error}")))?;
        if whole.len() + piece.len() > most {
            return Ok(None);
        }
        whole.extend_from_slice(&piece);
    }
    Ok(Some(whole))
}

/// How much of a body that is refused is still read, and for how long.
const UNREAD: usize = 64 << 20;
const UNREAD_WAIT: Duration = Duration::from_secs(10);

/// Reads what is left of a body that is refused. Many clients read no answer before they have sent everything, and see
/// but a connection that broke where it is closed on them.
pub(crate) async fn read_away(mut stream: BoxStream<'static, Result<Bytes, io::Error>>) {
    let reading = async {
        let mut left = UNREAD;
        while let Some(Ok(piece)) = stream.next().await {
            left = left.saturating_sub(piece.len());
            if left == 0 {
                return;
            }
        }
    };
    // Who is slower than that has been heard for long enough.
    let _ = tokio::time::timeout(UNREAD_WAIT, reading).await;
}
