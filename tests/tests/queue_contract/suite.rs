//! The contract's tests, generic over the home; `contract!` makes a test of each for one home.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hutch_proto::{Event, EventKind, JobId, JobState, Reason, Status, Timestamp};
use hutch_queue::{CancelOutcome, Finished, GiveBack, Submitted};

use crate::home::{Home, consumer, consumer_of, job, result, soon, success, take, unique, until, view};
pub(crate) use crate::told::{
    a_huge_result_is_cut_and_told, a_result_within_the_default_limits_is_whole, depths_are_told,
    events_are_told, jobs_are_listed, jobs_that_end_without_a_run_are_counted,
    what_is_not_there_is_not_found,
};

/// One test of each scenario, for one home.
macro_rules! contract {
    ($home:ty: $($scenario:ident),+ $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $scenario() {
                $crate::suite::$scenario::<$home>().await;
            }
        )+
    };
}
pub(crate) use contract;

/// The scenarios that every home must pass.
macro_rules! every_scenario {
    ($home:ty) => {
        $crate::suite::contract!($home:
            a_job_is_taken_and_finished,
            the_same_id_is_one_job,
            the_same_id_is_one_job_under_a_race,
            a_job_given_back_unspent_keeps_its_attempt,
            a_failed_attempt_is_counted,
            attempts_run_out,
            a_job_that_waits_too_long_expires,
            a_queued_job_is_cancelled,
            a_running_job_is_cancelled,
            a_cancelled_job_does_not_come_back,
            a_finished_job_is_not_cancelled,
            an_unknown_job_is_not_cancelled,
            higher_priority_comes_first,
            a_consumer_serves_several_queues,
            a_dropped_consumer_loses_its_job,
            a_dropped_take_loses_nothing,
            each_job_is_finished_once,
            the_first_result_stands,
            a_huge_result_is_cut_and_told,
            a_result_within_the_default_limits_is_whole,
            jobs_that_end_without_a_run_are_counted,
            jobs_are_listed,
            depths_are_told,
            events_are_told,
            what_is_not_there_is_not_found,
        );
    };
}
pub(crate) use every_scenario;

pub(crate) async fn a_job_is_taken_and_finished<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("plain"));
    let mut spec = job(&name);
    spec.labels.insert("tenant".to_owned(), "acme".to_owned());
    let before = Timestamp::now();

    assert_eq!(queue.submit(&spec).await.unwrap(), Submitted::New);
    let waiting = view(&queue, spec.id, JobState::Queued).await;
    assert_eq!(waiting.labels, spec.labels);
    assert_eq!(waiting.result, None);
    assert!(waiting.submitted_at >= before);

    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    assert_eq!(lease.job, spec);
    assert_eq!(lease.attempt, 1);
    assert_eq!(lease.submitted_at, waiting.submitted_at);
    let answer = success(&lease, "6\n");
    assert_eq!(consumer.finish(lease, answer.clone()).await.unwrap(), Finished::Recorded);
    assert_eq!(result(&queue, spec.id).await, answer);
}

pub(crate) async fn the_same_id_is_one_job<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("same"));
    let spec = job(&name);
    assert_eq!(queue.submit(&spec).await.unwrap(), Submitted::New);
    assert_eq!(queue.submit(&spec).await.unwrap(), Submitted::Known);
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    let answer = success(&lease, "once");
    consumer.finish(lease, answer.clone()).await.unwrap();
    result(&queue, spec.id).await;
    assert_eq!(queue.submit(&spec).await.unwrap(), Submitted::Known);

    // Whatever else were in the queue would come before this one.
    let last = job(&name);
    queue.submit(&last).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, last.id);
    assert_eq!(result(&queue, spec.id).await, answer);
}

pub(crate) async fn the_same_id_is_one_job_under_a_race<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("race"));
    let spec = job(&name);
    let outcomes = futures::future::join_all((0..50).map(|_| queue.submit(&spec))).await;
    let new = outcomes.iter().filter(|outcome| matches!(outcome, Ok(Submitted::New))).count();
    assert_eq!(new, 1);
    assert!(outcomes.iter().all(Result::is_ok));
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    let answer = success(&lease, "once");
    consumer.finish(lease, answer).await.unwrap();
    let last = job(&name);
    queue.submit(&last).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, last.id);
}

pub(crate) async fn a_job_given_back_unspent_keeps_its_attempt<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("unspent"));
    let mut spec = job(&name);
    spec.max_attempts = 1;
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    for _ in 0..4 {
        let lease = take(&mut consumer).await;
        assert_eq!((lease.job.id, lease.attempt), (spec.id, 1));
        consumer.give_back(lease, GiveBack::Unspent).await.unwrap();
    }
    let lease = take(&mut consumer).await;
    let answer = success(&lease, "");
    assert_eq!(consumer.finish(lease, answer).await.unwrap(), Finished::Recorded);
    assert_eq!(result(&queue, spec.id).await.status, Status::Succeeded);
}

pub(crate) fn host_error(message: &str) -> GiveBack {
    GiveBack::Failed { reason: Reason::HostError, message: message.to_owned() }
}

pub(crate) async fn a_failed_attempt_is_counted<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("failed"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    for attempt in 1..=2 {
        let lease = take(&mut consumer).await;
        assert_eq!((lease.job.id, lease.attempt), (spec.id, attempt));
        consumer.give_back(lease, host_error("no cgroup")).await.unwrap();
    }
    let lease = take(&mut consumer).await;
    assert_eq!(lease.attempt, 3);
    let answer = success(&lease, "");
    consumer.finish(lease, answer).await.unwrap();
    assert_eq!(result(&queue, spec.id).await.attempt, 3);
}

pub(crate) async fn attempts_run_out<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("poison"));
    let mut spec = job(&name);
    spec.max_attempts = 2;
    spec.labels.insert("tenant".to_owned(), "acme".to_owned());
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    for cause in ["first", "the disk is full"] {
        let lease = take(&mut consumer).await;
        consumer.give_back(lease, host_error(cause)).await.unwrap();
    }
    let answer = result(&queue, spec.id).await;
    assert_eq!((answer.status, answer.reason), (Status::InfraError, Some(Reason::HostError)));
    assert!(answer.message.contains("the disk is full"), "{}", answer.message);
    assert_eq!(answer.attempt, 2);
    assert_eq!(answer.labels, spec.labels);
    let letter = until("the dead letter", || async {
        home.dead_letters().await.into_iter().find(|(id, _)| *id == spec.id)
    })
    .await;
    assert!(letter.1.contains("host_error"), "{letter:?}");
    assert!(letter.1.contains("the disk is full"), "{letter:?}");

    let last = job(&name);
    queue.submit(&last).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, last.id, "the poison job must not come again");
    let letters = home.dead_letters().await;
    assert_eq!(letters.iter().filter(|(id, _)| *id == spec.id).count(), 1);
}

pub(crate) async fn a_job_that_waits_too_long_expires<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("expiry"));
    let mut events = queue.subscribe();
    let mut spec = job(&name);
    spec.expires_in_ms = Some(50);
    queue.submit(&spec).await.unwrap();
    // No worker is there: the queue itself must see to it.
    let answer = result(&queue, spec.id).await;
    assert_eq!((answer.status, answer.reason), (Status::Cancelled, Some(Reason::Expired)));
    assert_eq!(answer.attempt, 0);
    let told = soon("the event", finished_event(&mut events, spec.id)).await;
    assert_eq!(told, Status::Cancelled);

    let mut consumer = consumer(&queue, &name).await;
    let mut late = job(&name);
    late.expires_in_ms = Some(0);
    queue.submit(&late).await.unwrap();
    let mut lively = job(&name);
    lively.expires_in_ms = Some(60_000);
    queue.submit(&lively).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, lively.id);
    assert_eq!(result(&queue, late.id).await.reason, Some(Reason::Expired), "at once, with a worker there");
}

async fn finished_event(events: &mut tokio::sync::broadcast::Receiver<Event>, id: JobId) -> Status {
    loop {
        if let Ok(Event { id: told, kind: EventKind::Finished { status, .. }, .. }) = events.recv().await
            && told == id
        {
            return status;
        }
    }
}

pub(crate) async fn a_queued_job_is_cancelled<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("cancel"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    assert_eq!(queue.cancel(spec.id).await.unwrap(), CancelOutcome::Accepted);
    // At once, without a worker.
    let answer = result(&queue, spec.id).await;
    assert_eq!((answer.status, answer.reason), (Status::Cancelled, Some(Reason::Requested)));
    assert_eq!(queue.cancel(spec.id).await.unwrap(), CancelOutcome::AlreadyFinished);

    let mut consumer = consumer(&queue, &name).await;
    let last = job(&name);
    queue.submit(&last).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, last.id);
}

pub(crate) async fn a_running_job_is_cancelled<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("cancel-running"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    queue.publish(started(&lease)).await;
    view(&queue, spec.id, JobState::Running).await;
    assert_eq!(queue.cancel(spec.id).await.unwrap(), CancelOutcome::Accepted);
    soon("the wish to cancel", consumer.cancelled(spec.id)).await;
    // It stays said, however often one asks.
    soon("the wish to cancel", consumer.cancelled(spec.id)).await;
    let mut answer = success(&lease, "partial");
    answer.status = Status::Cancelled;
    answer.reason = Some(Reason::Requested);
    assert_eq!(consumer.finish(lease, answer.clone()).await.unwrap(), Finished::Recorded);
    assert_eq!(result(&queue, spec.id).await, answer);
}

pub(crate) fn started(lease: &hutch_queue::Lease) -> Event {
    Event {
        id: lease.job.id,
        attempt: lease.attempt,
        seq: 1,
        at: Timestamp::now(),
        kind: EventKind::Started { worker: "w-test".to_owned() },
    }
}

pub(crate) async fn a_cancelled_job_does_not_come_back<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("cancel-back"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    queue.publish(started(&lease)).await;
    view(&queue, spec.id, JobState::Running).await;
    assert_eq!(queue.cancel(spec.id).await.unwrap(), CancelOutcome::Accepted);
    soon("the wish to cancel", consumer.cancelled(spec.id)).await;
    consumer.give_back(lease, GiveBack::Unspent).await.unwrap();
    let last = job(&name);
    queue.submit(&last).await.unwrap();
    assert_eq!(take(&mut consumer).await.job.id, last.id);
    let answer = result(&queue, spec.id).await;
    assert_eq!((answer.status, answer.reason), (Status::Cancelled, Some(Reason::Requested)));
}

pub(crate) async fn a_finished_job_is_not_cancelled<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("cancel-late"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    let answer = success(&lease, "done");
    consumer.finish(lease, answer.clone()).await.unwrap();
    assert_eq!(queue.cancel(spec.id).await.unwrap(), CancelOutcome::AlreadyFinished);
    assert_eq!(result(&queue, spec.id).await, answer);
}

pub(crate) async fn an_unknown_job_is_not_cancelled<H: Home>() {
    let home = H::start().await;
    let outcome = home.queue().cancel(JobId::generate()).await.unwrap();
    assert_eq!(outcome, CancelOutcome::Unknown);
}

pub(crate) async fn higher_priority_comes_first<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("priority"));
    let mut jobs = Vec::new();
    for priority in [4, 0, 9, 4, 31, 9, 0] {
        let mut spec = job(&name);
        spec.priority = priority;
        queue.submit(&spec).await.unwrap();
        jobs.push((priority, spec.id));
    }
    let mut expected: Vec<_> = jobs.iter().enumerate().map(|(at, (p, id))| (31 - p, at, *id)).collect();
    expected.sort();
    let mut consumer = consumer(&queue, &name).await;
    for (_, _, id) in expected {
        let lease = take(&mut consumer).await;
        assert_eq!(lease.job.id, id);
        let answer = success(&lease, "");
        consumer.finish(lease, answer).await.unwrap();
    }
}

pub(crate) async fn a_consumer_serves_several_queues<H: Home>() {
    let home = H::start().await;
    let (queue, one, two) = (home.queue(), unique("one"), unique("two"));
    let mut consumer = consumer_of(&queue, &[&one, &two], Duration::from_secs(30)).await;
    let specs = [job(&one), job(&two), job(&two), job(&one)];
    let mut seen = Vec::new();
    for spec in &specs {
        queue.submit(spec).await.unwrap();
    }
    for _ in &specs {
        let lease = take(&mut consumer).await;
        seen.push(lease.job.id);
        assert_eq!(lease.attempt, 1);
        let answer = success(&lease, "");
        consumer.finish(lease, answer).await.unwrap();
    }
    seen.sort();
    let mut all: Vec<_> = specs.iter().map(|spec| spec.id).collect();
    all.sort();
    assert_eq!(seen, all);
}

pub(crate) async fn a_dropped_consumer_loses_its_job<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("dropped"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut first = consumer(&queue, &name).await;
    let lease = take(&mut first).await;
    assert_eq!(lease.attempt, 1);
    drop(first);
    let mut second = consumer(&queue, &name).await;
    let lease = take(&mut second).await;
    assert_eq!((lease.job.id, lease.attempt), (spec.id, 2));
    let answer = success(&lease, "");
    assert_eq!(second.finish(lease, answer).await.unwrap(), Finished::Recorded);
}

pub(crate) async fn a_dropped_take_loses_nothing<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("fickle"));
    let mut fickle = consumer(&queue, &name).await;
    let mut steady = consumer(&queue, &name).await;
    let specs: Vec<_> = (0..20).map(|_| job(&name)).collect();
    let mut seen = HashMap::new();
    for spec in &specs {
        queue.submit(spec).await.unwrap();
        // Let go at whatever moment: before it is asked, while a job is on its way, after.
        let taken = tokio::time::timeout(Duration::from_micros(300), fickle.take()).await;
        if let Ok(lease) = taken {
            let lease = lease.unwrap();
            seen.insert(lease.job.id, lease.attempt);
            let answer = success(&lease, "");
            fickle.finish(lease, answer).await.unwrap();
        }
    }
    drop(fickle);
    while seen.len() < specs.len() {
        let lease = take(&mut steady).await;
        assert_eq!(seen.insert(lease.job.id, lease.attempt), None, "taken twice");
        let answer = success(&lease, "");
        steady.finish(lease, answer).await.unwrap();
    }
    assert!(seen.values().all(|attempt| *attempt == 1), "no attempt was spent: {seen:?}");
}

pub(crate) async fn each_job_is_finished_once<H: Home>() {
    const JOBS: usize = 500;
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("many"));
    let ran: Arc<Mutex<HashMap<JobId, usize>>> = Arc::default();
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let mut consumer = consumer(&queue, &name).await;
        let ran = Arc::clone(&ran);
        workers.spawn(async move {
            loop {
                let lease = consumer.take().await.unwrap();
                *ran.lock().unwrap().entry(lease.job.id).or_default() += 1;
                let answer = success(&lease, &lease.job.id.to_string());
                assert_eq!(consumer.finish(lease, answer).await.unwrap(), Finished::Recorded);
            }
        });
    }
    let specs: Vec<_> = (0..JOBS).map(|_| job(&name)).collect();
    let submitted = futures::future::join_all(specs.iter().map(|spec| queue.submit(spec))).await;
    assert!(submitted.iter().all(|outcome| matches!(outcome, Ok(Submitted::New))));
    for spec in &specs {
        let answer = result(&queue, spec.id).await;
        assert_eq!(answer.stdout.data, spec.id.to_string().as_bytes());
    }
    let ran = ran.lock().unwrap().clone();
    assert_eq!(ran.len(), JOBS);
    assert!(ran.values().all(|times| *times == 1), "a job ran twice without any fault");
    workers.abort_all();
}

pub(crate) async fn the_first_result_stands<H: Home>() {
    let home = H::start().await;
    let (queue, name) = (home.queue(), unique("record"));
    let spec = job(&name);
    queue.submit(&spec).await.unwrap();
    let mut consumer = consumer(&queue, &name).await;
    let lease = take(&mut consumer).await;
    let again = hutch_queue::Lease { job: lease.job.clone(), ..lease };
    let (first, second) = (success(&lease, "first"), success(&lease, "second"));
    assert_eq!(consumer.finish(lease, first.clone()).await.unwrap(), Finished::Recorded);
    assert_eq!(consumer.finish(again, second).await.unwrap(), Finished::AlreadyFinished);
    assert_eq!(result(&queue, spec.id).await, first);
}
