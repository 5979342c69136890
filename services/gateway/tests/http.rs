//! The gateway over HTTP, on an embedded queue whose jobs the test itself finishes.

mod house;

use axum::http::{Method, StatusCode};
use hutch_proto::{Event, EventKind, JobId, OutputChunk, Timestamp};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use house::{Answer, House, output_file, tar_zst};

const SPEC: &str = r#"{"layers": ["host"], "command": ["true"], "labels": {"tenant": "acme"}}"#;

fn spec(id: JobId) -> String {
    json!({"id": id, "layers": ["host"], "command": ["true"]}).to_string()
}

#[tokio::test]
async fn a_job_goes_in_and_its_result_comes_out() {
    let house = House::new().await;
    let answer = house.post("/v1/jobs", SPEC).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    let id = answer.json()["id"].as_str().expect("id").to_owned();
    assert_eq!(answer.header("location"), format!("/v1/jobs/{id}"));
    let view = house.get(&format!("/v1/jobs/{id}")).await.json();
    assert_eq!((view["state"].as_str(), &view["result"]), (Some("queued"), &Value::Null));
    assert_eq!(view["labels"]["tenant"], "acme");

    let lease = house.take().await;
    assert_eq!(house.get(&format!("/v1/jobs/{id}")).await.json()["state"], "running");
    house.finish(lease, |result| result.stdout.data = b"hi\xff".to_vec()).await;
    let view = house.get(&format!("/v1/jobs/{id}")).await.json();
    assert_eq!(view["result"]["status"], "succeeded");
    let stdout = house.get(&format!("/v1/jobs/{id}/stdout")).await;
    assert_eq!(stdout.body, b"hi\xff");
    assert_eq!(stdout.header("content-type"), "text/plain; charset=utf-8");
    assert_eq!(stdout.header("x-content-type-options"), "nosniff");
    assert!(house.get(&format!("/v1/jobs/{id}/stderr")).await.body.is_empty());
}

#[tokio::test]
async fn the_same_id_twice_is_the_same_job() {
    let house = House::new().await;
    let id = JobId::generate();
    for _ in 0..3 {
        let answer = house.post("/v1/jobs", &spec(id)).await;
        assert_eq!((answer.status, answer.json()), (StatusCode::ACCEPTED, json!({"id": id})));
    }
    assert_eq!(house.get("/v1/jobs").await.json()["jobs"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_request_can_wait_for_the_result() {
    let house = House::new().await;
    let early = house.post("/v1/jobs?wait_ms=50", SPEC).await;
    assert_eq!(early.status, StatusCode::ACCEPTED);
    let lease = house.take().await;
    let id = lease.job.id;
    let answered = async { house.post("/v1/jobs?wait_ms=20000", &spec(id)).await };
    let (answer, ()) = tokio::join!(answered, async {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        house.finish(lease, |_| {}).await;
    });
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!((&answer.json()["id"], &answer.json()["status"]), (&json!(id), &json!("succeeded")));
    assert_eq!(
        house.post("/v1/jobs?wait_ms=1", &spec(id)).await.status,
        StatusCode::OK,
        "it is there already"
    );
}

#[tokio::test]
async fn what_is_wrong_is_a_problem_that_says_where() {
    let house = House::new().await;
    let big = format!(r#"{{"layers": ["host"], "stdin": {{"text": "{}"}}}}"#, "x".repeat(9 << 20));
    for (method, path, body, status, word) in [
        (Method::POST, "/v1/jobs", "", 400, "EOF"),
        (Method::POST, "/v1/jobs", "{", 400, "EOF"),
        (Method::POST, "/v1/jobs", "{}", 422, "layers"),
        (Method::POST, "/v1/jobs", r#"{"layers": ["host"], "comand": []}"#, 422, "comand"),
        (Method::POST, "/v1/jobs", &big, 413, "blobs"),
        (Method::POST, "/v1/jobs?wait_ms=x", SPEC, 400, "wait_ms"),
        (Method::POST, "/v1/jobs?wait_ms=99999999", SPEC, 400, "600000"),
        (Method::POST, "/v1/jobs?wait=1", SPEC, 400, "wait_ms"),
        (Method::POST, "/v1/jobs/batch", "{}", 422, "array"),
        (Method::POST, "/v1/jobs/batch", "[", 400, "EOF"),
        (Method::PUT, "/v1/jobs", SPEC, 405, "allow"),
        (Method::GET, "/v1/jobs?status=done", "", 400, "succeeded"),
        (Method::GET, "/v1/jobs/0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34", "", 404, "no job"),
        (Method::GET, "/v1/jobs/..%2f..%2fetc", "", 404, "UUID"),
        (Method::GET, "/v1/jobs/0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34/events", "", 404, "no job"),
        (Method::DELETE, "/v1/jobs/0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34", "", 404, "no job"),
        (Method::GET, "/v1/blobs/sha256:00", "", 404, "digest"),
        (Method::GET, "/v2/jobs", "", 404, "/openapi.json"),
    ] {
        let answer = house.send(method.clone(), path, body.into(), &[]).await;
        assert_eq!(answer.status.as_u16(), status, "{method} {path}: {}", answer.text());
        assert_eq!(answer.header("content-type"), "application/problem+json", "{method} {path}");
        let problem = answer.json();
        assert_eq!(problem["status"], status);
        assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains(word)), "{path}: {problem}");
        for field in ["type", "title"] {
            assert!(problem[field].is_string(), "{problem}");
        }
    }
    let problem = house.post("/v1/jobs", r#"{"layers": [], "priority": 40}"#).await.json();
    let paths: Vec<&str> =
        problem["problems"].as_array().expect("problems").iter().filter_map(|p| p["path"].as_str()).collect();
    assert_eq!(paths, ["layers", "priority"]);
}

/// A client that sends all of its request before it reads anything, as most do.
#[tokio::test]
async fn a_body_that_is_too_large_is_read_to_its_end_before_the_answer() {
    let house = House::new().await;
    let address = house.serve().await;
    for (path, announced) in
        [("/v1/jobs", true), ("/v1/jobs", false), ("/v1/blobs", true), ("/v1/jobs/batch", true)]
    {
        let body = "x".repeat(40 << 20);
        let (length, body) = match announced {
            true => (format!("content-length: {}", body.len()), body),
            false => {
                ("transfer-encoding: chunked".to_owned(), format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()))
            }
        };
        let mut stream = TcpStream::connect(address).await.expect("connect");
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("head");
        stream.write_all(body.as_bytes()).await.unwrap_or_else(|error| panic!("{path} {announced}: {error}"));
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answer");
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("too_large"), "{path}: {answer}");
    }
}

#[tokio::test]
async fn a_body_that_is_not_utf_8_is_not_json() {
    let house = House::new().await;
    for (path, body) in [
        ("/v1/jobs", &b"\xff\xfe"[..]),
        ("/v1/jobs", b"{\"layers\": [\"host\xff\"]}"),
        ("/v1/jobs/batch", b"[{\"layers\": [\"host\xff\"]}]"),
    ] {
        let answer = house.send(Method::POST, path, body.to_vec(), &[]).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text());
        assert_eq!(answer.json()["type"], "urn:hutch:problem:not_json");
    }
}

#[tokio::test]
async fn a_batch_is_answered_entry_by_entry() {
    let house = House::new().await;
    let answer = house.post("/v1/jobs/batch", &format!("[{SPEC}, {{}}, {SPEC}, 7]")).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    let answer = answer.json();
    let entries = answer.as_array().expect("array");
    assert_eq!(entries.len(), 4);
    assert!(entries[0]["id"].is_string() && entries[2]["id"].is_string());
    assert_eq!(entries[1]["problem"]["status"], 422);
    assert_eq!(entries[3]["problem"]["status"], 422);
    let depths = house.get("/v1/queues").await.json();
    assert_eq!(depths["queues"][0], json!({"queue": "default", "queued": 2, "running": 0}));
}

#[tokio::test]
async fn jobs_are_listed_page_by_page() {
    let house = House::new().await;
    let mut ids: Vec<JobId> = Vec::new();
    for _ in 0..5 {
        let id = JobId::generate();
        house.post("/v1/jobs", &spec(id)).await;
        ids.push(id);
    }
    let lease = house.take().await;
    house.finish(lease, |result| result.stdout.data = vec![b'x'; 5000]).await;
    let list = |query: &str| {
        let path = format!("/v1/jobs?{query}");
        let house = &house;
        async move { house.get(&path).await.json() }
    };
    let first = list("limit=2").await;
    assert_eq!(first["jobs"][0]["id"], json!(ids[4]), "newest first");
    let second = list(&format!("limit=2&after={}", first["next"].as_str().expect("next"))).await;
    assert_eq!(second["jobs"][1]["id"], json!(ids[1]));
    let last = list(&format!("limit=2&after={}", second["next"].as_str().expect("next"))).await;
    assert_eq!((last["jobs"].as_array().map(Vec::len), &last["next"]), (Some(1), &Value::Null));
    let finished = list("status=finished").await;
    assert_eq!(finished["jobs"].as_array().map(Vec::len), Some(1));
    let stdout = &finished["jobs"][0]["result"]["stdout"];
    assert_eq!((stdout["text"].as_str().map(str::len), &stdout["truncated"]), (Some(1024), &json!(true)));
    assert_eq!(list("status=queued&label=tenant:acme").await["jobs"], json!([]));
}

#[tokio::test]
async fn a_job_can_be_called_off() {
    let house = House::new().await;
    let id = JobId::generate();
    house.post("/v1/jobs", &spec(id)).await;
    let path = format!("/v1/jobs/{id}");
    for outcome in ["accepted", "already_finished"] {
        let answer = house.send(Method::DELETE, &path, Vec::new(), &[]).await;
        assert_eq!((answer.status, &answer.json()["outcome"]), (StatusCode::ACCEPTED, &json!(outcome)));
    }
    assert_eq!(house.get(&path).await.json()["result"]["reason"], "requested");
}

/// The kinds and ids of a stream of events.
fn told(answer: &Answer) -> Vec<(String, String)> {
    let text = answer.text();
    let field = |block: &str, name: &str| {
        block.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim().to_owned()
    };
    text.split("\n\n")
        .filter(|block| block.contains("data:"))
        .map(|block| (field(block, "event:"), field(block, "id:")))
        .collect()
}

fn event(id: JobId, seq: u64, kind: EventKind) -> Event {
    Event { id, attempt: 1, seq, at: Timestamp::now(), kind }
}

#[tokio::test]
async fn events_are_replayed_and_taken_up_again() {
    let house = House::new().await;
    let id = JobId::generate();
    house.post("/v1/jobs", &spec(id)).await;
    let lease = house.take().await;
    let path = format!("/v1/jobs/{id}/events");
    let (live, ()) = tokio::join!(house.get(&path), async {
        house.queue.publish(event(id, 1, EventKind::Started { worker: "w".to_owned() })).await;
        house.queue.publish(event(id, 2, EventKind::Stdout(OutputChunk::new("main", b"hi")))).await;
        tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        assert_eq!(house.get(&format!("/v1/jobs/{id}/stdout")).await.body, b"hi", "so far");
        house.finish(lease, |_| {}).await;
    });
    let expected = [("started", "1.1"), ("stdout", "1.2"), ("finished", "1.3")];
    let expected: Vec<_> = expected.iter().map(|(kind, id)| ((*kind).to_owned(), (*id).to_owned())).collect();
    assert_eq!(live.header("content-type"), "text/event-stream");
    assert_eq!(told(&live), expected);
    assert_eq!(told(&house.get(&path).await), expected, "replayed");
    for (last, rest) in [("1.1", 1), ("1.2", 2), ("1.3", 3)] {
        let again = house.send(Method::GET, &path, Vec::new(), &[("last-event-id", last)]).await;
        assert_eq!(told(&again), expected[rest..], "after {last}");
    }
    let wrong = house.send(Method::GET, &path, Vec::new(), &[("last-event-id", "x")]).await;
    assert_eq!(wrong.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_job_that_ended_before_tells_its_story() {
    let house = House::new().await;
    let id = JobId::generate();
    house.post("/v1/jobs", &spec(id)).await;
    let lease = house.take().await;
    house.finish(lease, |_| {}).await;
    let other = house.another_gateway();
    let answer = other.get(&format!("/v1/jobs/{id}/events")).await;
    let kinds: Vec<String> = told(&answer).into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, ["started", "stdout", "finished"], "{}", answer.text());
    assert!(answer.text().contains(r#""text":"from a step""#));
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_come_one_by_one() {
    let house = House::new().await;
    let id = JobId::generate();
    house.post("/v1/jobs", &spec(id)).await;
    let path = format!("/v1/jobs/{id}/outputs");
    assert_eq!(house.get(&path).await.status, StatusCode::CONFLICT, "not finished");
    let archive = house.blobs.put(tar_zst("box/a b/ü.txt", b"content").into()).await.expect("put");
    let lease = house.take().await;
    house
        .finish(lease, |result| {
            result.outputs.files.push(output_file("/box/a b/ü.txt", b"content"));
            result.outputs.archive =
                Some(hutch_proto::Archive { blob: archive.digest.clone(), bytes: archive.bytes });
        })
        .await;
    assert_eq!(house.get(&path).await.json()["files"][0]["path"], "/box/a b/ü.txt");
    let file = house.get(&format!("{path}/box/a%20b/%C3%BC.txt")).await;
    assert_eq!((file.status, file.body.as_slice()), (StatusCode::OK, &b"content"[..]));
    assert_eq!(file.header("content-disposition"), "attachment");
    assert!(file.header("content-security-policy").contains("sandbox"));
    assert_eq!(house.get(&format!("{path}/box/../etc/passwd")).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn blobs_go_in_up_to_a_cap() {
    let house = House::new().await;
    let answer = house.post("/v1/blobs", "hello").await;
    assert_eq!(answer.status, StatusCode::CREATED);
    let blob = answer.json()["blob"].as_str().expect("blob").to_owned();
    assert_eq!(answer.json()["bytes"], 5);
    assert_eq!(house.get(&format!("/v1/blobs/{blob}")).await.body, b"hello");
    assert_eq!(house.post("/v1/blobs", &"x".repeat(2000)).await.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn a_queue_that_is_gone_is_said_so() {
    let house = House::new().await;
    assert_eq!(house.get("/readyz").await.status, StatusCode::OK);
    house.queue.close().await;
    for answer in [house.post("/v1/jobs", SPEC).await, house.get("/readyz").await] {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{}", answer.text());
    }
    assert_eq!(house.get("/healthz").await.status, StatusCode::OK, "alive all the same");
}

#[tokio::test]
async fn routes_are_labels_and_paths_are_not() {
    let house = House::new().await;
    house.post("/v1/jobs", SPEC).await;
    for n in 0..5 {
        house.get(&format!("/v1/jobs/{}", JobId::generate())).await;
        house.get(&format!("/nowhere/{n}")).await;
    }
    house.send(Method::from_bytes(b"MADEUP").expect("method"), "/v1/jobs", Vec::new(), &[]).await;
    let text = house.get("/metrics").await.text();
    for row in [
        r#"hutch_http_requests_total{method="GET",route="/v1/jobs/{id}",status="404"} 5"#,
        r#"hutch_http_requests_total{method="GET",route="unmatched",status="404"} 5"#,
        r#"hutch_http_requests_total{method="other",route="/v1/jobs",status="405"} 1"#,
        r#"hutch_queue_depth{queue="default",state="queued"} 1"#,
        r#"hutch_http_request_seconds_count{method="POST",route="/v1/jobs"} 1"#,
    ] {
        assert!(text.contains(row), "{row}\n{text}");
    }
}

#[tokio::test]
async fn every_route_is_documented_and_every_path_served() {
    let house = House::new().await;
    let document = house.get("/openapi.json").await.json();
    let paths = document["paths"].as_object().expect("paths");
    let id = JobId::generate().to_string();
    for (path, operations) in paths {
        let real = path.replace("{id}", &id).replace("{path}", "a").replace("{digest}", "x");
        for method in operations.as_object().expect("operations").keys().filter(|key| *key != "parameters") {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("method");
            house.send(method.clone(), &real, b"[]".to_vec(), &[]).await;
            let metrics = house.get("/metrics").await.text();
            let row = format!(
                r#"hutch_http_requests_total{{method="{method}",route="{}",status="#,
                path.replace("{path}", "{*path}")
            );
            assert!(metrics.contains(&row), "{row}");
            assert!(!metrics.contains(&format!(r#"{row}"405""#)), "{row}");
        }
    }
    assert_eq!(paths.len(), 17, "a route was added: document it, and count it here");
}

#[tokio::test]
async fn the_page_is_strict() {
    let house = House::new().await;
    let page = house.get("/").await;
    let policy = page.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none'") && policy.contains("script-src 'sha256-"), "{policy}");
    assert!(page.text().contains("<title>hutch</title>"));
}

#[tokio::test]
async fn tokens_open_what_their_scopes_say() {
    let house = House::with_tokens().await;
    let with = |token: &'static str| [("authorization", token)];
    for (token, submit, read) in [
        ("", 401, 401),
        ("Bearer wrong", 401, 401),
        ("Bearer reader", 403, 200),
        ("Bearer submitter", 202, 403),
        ("bearer admin", 202, 200),
    ] {
        let headers = with(token);
        let post = house.send(Method::POST, "/v1/jobs", SPEC.into(), &headers).await;
        assert_eq!(post.status.as_u16(), submit, "{token}");
        let get = house.send(Method::GET, "/v1/jobs", Vec::new(), &headers).await;
        assert_eq!(get.status.as_u16(), read, "{token}");
    }
    for open in ["/", "/healthz", "/readyz", "/metrics", "/openapi.json"] {
        assert_eq!(house.get(open).await.status, StatusCode::OK, "{open}");
    }
}

#[tokio::test]
async fn a_submitter_sees_the_result_of_no_job_but_its_own() {
    let house = House::with_tokens().await;
    let post = |token: &'static str, id: JobId| {
        let house = &house;
        async move {
            let headers = [("authorization", token)];
            house.send(Method::POST, "/v1/jobs?wait_ms=20000", spec(id).into(), &headers).await
        }
    };
    let id = JobId::generate();
    let (own, ()) = tokio::join!(post("Bearer submitter", id), async {
        let lease = house.take().await;
        house.finish(lease, |_| {}).await;
    });
    assert_eq!((own.status, &own.json()["status"]), (StatusCode::OK, &json!("succeeded")));
    let others = post("Bearer submitter", id).await;
    assert_eq!(others.status, StatusCode::ACCEPTED, "{}", others.text());
    assert_eq!((&others.json()["id"], &others.json()["status"]), (&json!(id), &Value::Null));
    assert!(others.json()["withheld"].as_str().is_some_and(|why| why.contains("read")), "{}", others.text());
    let admin = post("Bearer admin", id).await;
    assert_eq!((admin.status, &admin.json()["status"]), (StatusCode::OK, &json!("succeeded")));
}

#[tokio::test]
async fn without_tokens_strange_pages_are_refused() {
    let house = House::new().await;
    let strange =
        house.send(Method::POST, "/v1/jobs", SPEC.into(), &[("origin", "http://evil.example")]).await;
    assert_eq!(strange.status, StatusCode::FORBIDDEN);
    let rebound = house.send(Method::GET, "/v1/jobs", Vec::new(), &[("host", "evil.example")]).await;
    assert_eq!(rebound.status, StatusCode::FORBIDDEN);
}

#[test]
fn nobody_listens_to_the_world_without_tokens() {
    let check = |address: &str| {
        hutch_gateway::Gateway::check_exposure(address.parse().expect("address"), None)
            .map_err(|e| e.to_string())
    };
    assert!(
        check("127.0.0.1:1").is_ok() && check("[::1]:1").is_ok() && check("[::ffff:127.0.0.1]:1").is_ok()
    );
    for open in ["0.0.0.0:1", "[::]:1", "10.1.2.3:1"] {
        let error = check(open).expect_err(open);
        assert!(error.contains("tokens_file") && error.contains("127.0.0.1"), "{error}");
    }
}
