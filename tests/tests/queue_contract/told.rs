//! Scenarios of the contract that are about what is told of jobs: results, lists, counts and events.

use std::collections::BTreeMap;

use hutch_proto::{Captured, EventKind, JobId, JobState, Status};
use hutch_queue::{Finished, ListFilter};

use crate::home::{Home, consumer, job, result, soon, success, take, unique, until};
use crate::suite::{host_error, started};

fn captured(data: Vec<u8>) -> Captured {
    Captured { bytes: data.len() as u64, data, truncated: false }
}

/// More output than a home carries, on both streams, of the kind that costs most.
pub(crate) async fn a_huge_result_is_cut_and_told<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("huge"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    let mut answer = success(&lease, "");
    (answer.stdout, answer.stderr) = (captured(vec![0; 64 << 20]), captured(vec![0; 64 << 20]));
    assert_eq!(consumer.finish(lease, answer).await.unwrap(), Finished::Recorded);
    let told = result(&queue, spec.id).await;
    for stream in [&told.stdout, &told.stderr] {
        assert!(stream.truncated);
        assert_eq!(stream.bytes, 64 << 20);
        // Its half of 10 MiB, as base64.
        assert!(stream.data.len() > 3 << 20, "{}", stream.data.len());
    }
}

/// `head -c 1048576 /dev/zero`.
pub(crate) async fn a_result_within_the_default_limits_is_whole<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("zeros"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    let mut answer = success(&lease, "");
    answer.stdout = captured(vec![0; 1 << 20]);
    assert_eq!(consumer.finish(lease, answer.clone()).await.unwrap(), Finished::Recorded);
    assert_eq!(result(&queue, spec.id).await, answer);
}

pub(crate) async fn jobs_that_end_without_a_run_are_counted<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("unrun"));
    let (cancelled, mut expired, mut poison, run) = (job(&name), job(&name), job(&name), job(&name));
    queue.submit(&cancelled).await.unwrap();
    queue.cancel(cancelled.id).await.unwrap();
    expired.expires_in_ms = Some(1);
    queue.submit(&expired).await.unwrap();
    result(&queue, expired.id).await;
    let mut consumer = consumer(&queue, &name).await;
    poison.max_attempts = 1;
    queue.submit(&poison).await.unwrap();
    let lease = take(&mut consumer).await;
    consumer.give_back(lease, host_error("no cgroup")).await.unwrap();
    result(&queue, poison.id).await;
    queue.submit(&run).await.unwrap();
    let lease = take(&mut consumer).await;
    let answer = success(&lease, "");
    consumer.finish(lease, answer).await.unwrap();
    let mut counted: Vec<_> = queue
        .unrun()
        .into_iter()
        .filter(|ended| ended.queue == name)
        .map(|ended| (ended.status.as_str(), ended.reason.as_str(), ended.jobs))
        .collect();
    counted.sort();
    let expected =
        [("cancelled", "expired", 1), ("cancelled", "requested", 1), ("infra_error", "host_error", 1)];
    assert_eq!(counted, expected);
}

pub(crate) async fn jobs_are_listed<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("list"));
    let mut consumer = consumer(&queue, &name).await;
    let mut ids = Vec::new();
    for number in 0..6 {
        let mut spec = job(&name);
        spec.labels = BTreeMap::from([
            ("suite".to_owned(), name.clone()),
            ("half".to_owned(), (number % 2).to_string()),
        ]);
        queue.submit(&spec).await.unwrap();
        ids.push(spec.id);
    }
    for _ in 0..2 {
        let lease = take(&mut consumer).await;
        let answer = success(&lease, "");
        consumer.finish(lease, answer).await.unwrap();
    }
    result(&queue, ids[0]).await;
    result(&queue, ids[1]).await;
    let ours = || ListFilter {
        label: Some(("suite".to_owned(), name.clone())),
        limit: 100,
        ..ListFilter::default()
    };
    let list = async |filter: ListFilter| -> Vec<JobId> {
        queue.list(&filter).await.unwrap().into_iter().map(|view| view.id).collect()
    };
    let newest_first: Vec<_> = ids.iter().rev().copied().collect();
    assert_eq!(list(ours()).await, newest_first);
    assert_eq!(list(ListFilter { limit: 2, ..ours() }).await, newest_first[..2]);
    assert_eq!(list(ListFilter { after: Some(ids[4]), limit: 2, ..ours() }).await, newest_first[2..4]);
    assert_eq!(list(ListFilter { state: Some(JobState::Queued), ..ours() }).await, newest_first[..4]);
    assert_eq!(list(ListFilter { state: Some(JobState::Finished), ..ours() }).await, newest_first[4..]);
    assert_eq!(list(ListFilter { status: Some(Status::Succeeded), ..ours() }).await, newest_first[4..]);
    assert_eq!(list(ListFilter { status: Some(Status::Failed), ..ours() }).await, []);
    let odd = ListFilter { label: Some(("half".to_owned(), "1".to_owned())), limit: 100, ..ours() };
    assert_eq!(list(odd).await, [ids[5], ids[3], ids[1]]);
}

pub(crate) async fn depths_are_told<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("depths"));
    for priority in [4, 4, 20] {
        let mut spec = job(&name);
        spec.priority = priority;
        queue.submit(&spec).await.unwrap();
    }
    let depth = async || {
        let all = queue.depths().await.unwrap();
        all.iter().find(|depth| depth.queue == name).map(|depth| (depth.queued, depth.running))
    };
    until("three to wait", || async { (depth().await == Some((3, 0))).then_some(()) }).await;
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    queue.publish(started(&lease)).await;
    until("one to run", || async { (depth().await == Some((2, 1))).then_some(()) }).await;
    let answer = success(&lease, "");
    consumer.finish(lease, answer).await.unwrap();
    until("none to run", || async { (depth().await == Some((2, 0))).then_some(()) }).await;
    for _ in 0..2 {
        let lease = take(&mut consumer).await;
        let answer = success(&lease, "");
        consumer.finish(lease, answer).await.unwrap();
    }
    until("an empty queue to be told of too", || async { (depth().await == Some((0, 0))).then_some(()) })
        .await;
}

pub(crate) async fn events_are_told<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("events"));
    let mut events = queue.subscribe();
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    let mut event = started(&lease);
    queue.publish(event.clone()).await;
    event.seq = 2;
    event.kind = EventKind::Stdout(hutch_proto::OutputChunk::new("main", b"6\n"));
    queue.publish(event.clone()).await;
    let answer = success(&lease, "6\n");
    consumer.finish(lease, answer).await.unwrap();

    let mut told = Vec::new();
    while told.len() < 3 {
        let event = soon("an event", events.recv()).await.unwrap();
        if event.id == spec.id {
            told.push(event);
        }
    }
    assert_eq!(
        told.iter().map(|event| event.kind.name()).collect::<Vec<_>>(),
        ["started", "stdout", "finished"]
    );
    assert_eq!(told.iter().map(|event| event.seq).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(told[1], event);
    assert_eq!(told[2].kind, EventKind::Finished { status: Status::Succeeded, reason: None });
    // Whoever hears of the end finds the result.
    assert!(queue.get(spec.id).await.unwrap().unwrap().result.is_some());
}

pub(crate) async fn what_is_not_there_is_not_found<H: Home>() {
    let home = H::start().await;
    let queue = home.queue();
    assert_eq!(queue.get(JobId::generate()).await.unwrap(), None);
    assert!(queue.connected());
}
