//! One gateway, over HTTP.

use std::time::Duration;

use anyhow::{anyhow, bail};
use hutch_proto::{JobId, JobView};
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;

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
