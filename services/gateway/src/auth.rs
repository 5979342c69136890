//! Who may do what.
//!
//! With tokens: `Authorization: Bearer …` on everything below `/v1`; the file keeps only the SHA-256
//! of each. Without: only this machine, and since a browser on it visits strange pages, a request must
//! name this machine as its host, and must not come from a page of another (DNS rebinding, CSRF).

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hutch_layers::Hasher;

use crate::Gateway;
use crate::problem::Problem;

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Hand in jobs and blobs, and call jobs off.
    Submit,
    /// See jobs, results, outputs and queues.
    Read,
    /// Everything.
    Admin,
}

impl Scope {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "submit" => Some(Self::Submit),
            "read" => Some(Self::Read),
            "admin" => Some(Self::Admin),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Submit => "submit",
            Self::Read => "read",
            Self::Admin => "admin",
        }
    }
}

/// Why a file of tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// It cannot be read.
    #[error("the tokens file {path} cannot be read")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line is not as it should be.
    #[error(
        "line {line} of the tokens file: {message}; `scope[,scope] sha256 name` is expected, such as \
         `submit,read {} ci`, where the digits are those of `printf %s TOKEN | sha256sum`",
        "2c26b46b…"
    )]
    Line {
        /// Which line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    name: String,
    scopes: Vec<Scope>,
}

/// The tokens that are known, by their hash.
#[derive(Debug, Clone)]
pub struct Tokens(HashMap<String, Token>);

impl Tokens {
    /// Reads the tokens of a file.
    ///
    /// # Errors
    /// [`TokensError`].
    pub fn read(path: &Path) -> Result<Self, TokensError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| TokensError::Read { path: path.display().to_string(), source })?;
        Self::parse(&text)
    }

    /// Reads tokens, one a line; `#` begins a comment.
    ///
    /// # Errors
    /// [`TokensError::Line`].
    pub fn parse(text: &str) -> Result<Self, TokensError> {
        let mut tokens = HashMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |message: String| TokensError::Line { line: index + 1, message };
            let (hash, token) = token(line).map_err(wrong)?;
            if tokens.insert(hash, token).is_some() {
                return Err(wrong("this token is there already".to_owned()));
            }
        }
        if tokens.is_empty() {
            return Err(TokensError::Line { line: 1, message: "there is no token".to_owned() });
        }
        Ok(Self(tokens))
    }

    /// Whom a request is from.
    fn of(&self, headers: &HeaderMap) -> Option<&Token> {
        let text = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, token) = text.split_once(' ')?;
        // The token is looked up by its hash: timing tells nothing of those that are known.
        let hash = Hasher::digest_of(token.trim().as_bytes());
        scheme.eq_ignore_ascii_case("bearer").then(|| self.0.get(hash.hex())).flatten()
    }
}

fn token(line: &str) -> Result<(String, Token), String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [scopes, hash, name] = fields[..] else {
        return Err(format!("three fields are needed, these are {}", fields.len()));
    };
    let scopes = scopes
        .split(',')
        .map(|scope| Scope::parse(scope).ok_or_else(|| format!("`{scope}` is none of submit, read, admin")))
        .collect::<Result<_, _>>()?;
    let hash = hash.to_ascii_lowercase();
    if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("the second field must have 64 hexadecimal digits".to_owned());
    }
    Ok((hash, Token { name: name.to_owned(), scopes }))
}

/// Whether the sender of a request may also see what others handed in. Every request that is let through has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MayRead(pub(crate) bool);

/// Lets a request through if its sender has this scope.
pub(crate) async fn require(
    State((gateway, scope)): State<(Arc<Gateway>, Scope)>,
    mut request: Request,
    next: Next,
) -> Response {
    let (refused, may_read) = match &gateway.config.tokens {
        Some(tokens) => {
            let refused = |scope| by_token(tokens, request.headers(), scope);
            (refused(scope), refused(Scope::Read).is_none())
        }
        None => (by_host(request.uri(), request.headers()), true),
    };
    if let Some(problem) = refused {
        return problem.into_response();
    }
    request.extensions_mut().insert(MayRead(may_read));
    next.run(request).await
}

fn by_token(tokens: &Tokens, headers: &HeaderMap, scope: Scope) -> Option<Problem> {
    let Some(token) = tokens.of(headers) else {
        return Some(Problem::unauthorized(headers.contains_key(header::AUTHORIZATION)));
    };
    let allowed = token.scopes.contains(&scope) || token.scopes.contains(&Scope::Admin);
    (!allowed).then(|| {
        let has: Vec<&str> = token.scopes.iter().map(|scope| scope.name()).collect();
        Problem::forbidden(format!(
            "the token `{}` has {}; this needs {}",
            token.name,
            has.join(", "),
            scope.name()
        ))
    })
}

/// Why a request without a token is not from this machine's own user; none if it is.
fn by_host(uri: &Uri, headers: &HeaderMap) -> Option<Problem> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST).or_else(|| uri.authority().map(|authority| authority.as_str()));
    let Some(host) = host.filter(|host| is_local(host)) else {
        return Some(Problem::forbidden(
            "this gateway has no tokens and serves this machine alone: use http://127.0.0.1 or http://localhost"
                .to_owned(),
        ));
    };
    let origin = headers.get(header::ORIGIN)?;
    let own =
        origin.to_str().ok().and_then(|origin| origin.split_once("://")).is_some_and(|(_, of)| of == host);
    (!own).then(|| {
        Problem::forbidden(
            "this gateway has no tokens and takes no requests from other sites' pages".to_owned(),
        )
    })
}

/// Whether a `Host` header names this machine.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";

    fn bearer(token: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, format!("Bearer {token}").parse().expect("header"))])
    }

    #[test]
    fn a_token_has_its_scopes_and_no_more() {
        let tokens = Tokens::parse(&format!("# people\n\nread {HASH} ann\n")).expect("tokens");
        assert!(by_token(&tokens, &bearer("foo"), Scope::Read).is_none());
        let problem = by_token(&tokens, &bearer("foo"), Scope::Submit).expect("forbidden");
        assert_eq!(problem.status.as_u16(), 403);
        assert!(problem.detail.contains("`ann` has read; this needs submit"), "{}", problem.detail);
        for headers in [HeaderMap::new(), bearer("bar"), bearer(""), bearer(HASH)] {
            let problem = by_token(&tokens, &headers, Scope::Read).expect("unknown");
            assert_eq!(problem.status.as_u16(), 401);
            let given = headers.contains_key(header::AUTHORIZATION);
            assert_eq!(problem.detail.contains("knows"), given, "{}", problem.detail);
        }
        let admin = Tokens::parse(&format!("admin {HASH} root")).expect("tokens");
        assert!(by_token(&admin, &bearer("foo"), Scope::Submit).is_none());
    }

    #[test]
    fn a_wrong_line_is_named() {
        for (text, word) in [
            ("", "no token"),
            ("read x", "three fields"),
            ("write 00 x", "`write`"),
            ("read 00 x", "64"),
            (&format!("read {HASH} a\nread {HASH} b"), "line 2"),
        ] {
            let error = Tokens::parse(text).expect_err(text).to_string();
            assert!(error.contains(word) && error.contains("sha256sum"), "{error}");
        }
    }

    #[test]
    fn without_tokens_only_this_machine_s_own_pages_are_served() {
        let of = |host: &str, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().expect("header"));
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().expect("header"));
            }
            by_host(&Uri::from_static("/"), &headers).is_none()
        };
        for host in ["127.0.0.1:7070", "localhost:7070", "LOCALHOST", "[::1]:7070", "127.9.9.9"] {
            assert!(of(host, None), "{host}");
        }
        for host in ["evil.example:7070", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:7070", ""] {
            assert!(!of(host, None), "{host}");
        }
        assert!(of("localhost:7070", Some("http://localhost:7070")));
        for origin in ["http://evil.example", "http://localhost:8080", "null"] {
            assert!(!of("localhost:7070", Some(origin)), "{origin}");
        }
    }
}
