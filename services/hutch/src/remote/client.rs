//! One gateway, over HTTP.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use hutch_proto::{JobId, JobView};
use reqwest::{Method, Response, StatusCode, Upgraded};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::cli::ClientArgs;
use crate::term::safe_line;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);

/// One gateway.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    url: String,
    token: Option<String>,
}

/// What a gateway says when it does not do as asked.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Problem {
    title: String,
    detail: String,
    problems: Vec<Field>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Field {
    path: String,
    message: String,
}

impl Client {
    /// The gateway that these arguments name.
    pub(crate) fn new(args: &ClientArgs) -> anyhow::Result<Self> {
        let url = args.url.trim_end_matches('/').to_owned();
        if !url.starts_with("http://") && !url.starts_with("https://") {
            bail!("--url `{url}`: an address such as http://127.0.0.1:7070 is expected");
        }
        // Only the first call in a process sets it; all set the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .http1_only()
            .connect_timeout(CONNECT)
            .user_agent(concat!("hutch/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self { http, url, token: args.token.clone() })
    }

    /// Asks for something; an answer that is a refusal is an error.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<Response> {
        let answer = self.send(method, path, body, &[]).await?;
        if answer.status().is_success() { Ok(answer) } else { Err(refusal(answer).await) }
    }

    /// Asks for something with these headers, and gives the answer whatever it is.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Response> {
        let mut request = self.http.request(method, format!("{}{path}", self.url));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.map_err(|error| {
            if error.is_connect() {
                anyhow!(
                    "no gateway answers at {}: start one with `hutch up`, or name another with --url or HUTCH_URL",
                    self.url
                )
            } else {
                anyhow::Error::new(error).context("the gateway does not answer")
            }
        })
    }

    /// Changes over to a WebSocket (RFC 6455) there.
    pub(crate) async fn web_socket(&self, path: &str) -> anyhow::Result<WebSocketStream<Upgraded>> {
        let key = handshake::client::generate_key();
        let headers = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", &key),
        ];
        let answer = self.send(Method::GET, path, None, &headers).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(answer).await);
        }
        let accepted = answer.headers().get("sec-websocket-accept").map(|accept| accept.as_bytes().to_vec());
        if accepted != Some(handshake::derive_accept_key(key.as_bytes()).into_bytes()) {
            bail!("the gateway's answer is no WebSocket's: a proxy between may not pass one on");
        }
        let upgraded = answer.upgrade().await.context("the connection does not become a WebSocket")?;
        Ok(WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await)
    }

    /// Asks for something that is JSON.
    pub(crate) async fn json<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let answer = self.ask(Method::GET, path, None).await?;
        let bytes = answer.bytes().await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| anyhow!("the gateway's answer is not understood: {error}"))
    }

    /// What is known of a job.
    pub(crate) async fn job(&self, id: JobId) -> anyhow::Result<JobView> {
        self.json(&format!("/v1/jobs/{id}")).await
    }
}

/// What a gateway says of a request that it refused.
pub(crate) async fn refusal(answer: Response) -> anyhow::Error {
    let status = answer.status();
    let bytes = answer.bytes().await.unwrap_or_default();
    let problem: Problem = serde_json::from_slice(&bytes).unwrap_or_default();
    if !problem.problems.is_empty() {
        let lines: Vec<String> = problem
            .problems
            .iter()
            .map(|field| {
                if field.path.is_empty() {
                    field.message.clone()
                } else {
                    format!("{}: {}", field.path, field.message)
                }
            })
            .collect();
        return anyhow!("{}: {}", safe_line(&problem.title).to_lowercase(), safe_line(&lines.join("; ")));
    }
    let detail = if problem.detail.is_empty() {
        format!("the gateway answered {status}")
    } else {
        safe_line(&problem.detail)
    };
    match status {
        StatusCode::UNAUTHORIZED => anyhow!("{detail}; give it with --token or HUTCH_TOKEN"),
        _ => anyhow!(detail),
    }
}
