//! `GET /v1/jobs`: jobs, newest first, page by page.
//!
//! Each looks as it does alone, but its output is cut short and its files are left out, and both say
//! so (`truncated`): a page must stay small.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use hutch_proto::{Captured, JobId, JobResult, JobState, JobView, Status};
use hutch_queue::ListFilter;
use serde_json::{Value, json};

use crate::Gateway;
use crate::extract::Query;
use crate::problem::Problem;

/// Jobs of one page, where nothing is asked.
const PAGE: usize = 50;
/// The most jobs of one page.
const MOST: usize = 500;
/// How much of a job's output is shown in a list.
const OUTPUT: usize = 1024;

/// `GET /v1/jobs?status=&label=&after=&limit=`.
pub(crate) async fn list(State(gateway): State<Arc<Gateway>>, uri: Uri) -> Result<Json<Value>, Problem> {
    let filter = filter(&Query::of(&uri, &["status", "label", "after", "limit"])?)?;
    let jobs: Vec<JobView> =
        gateway.ask(gateway.queue.list(&filter)).await?.into_iter().map(shortened).collect();
    let next = jobs.last().filter(|_| jobs.len() >= filter.limit).map(|job| job.id);
    Ok(Json(json!({"jobs": jobs, "next": next})))
}

fn filter(query: &Query) -> Result<ListFilter, Problem> {
    let mut filter = ListFilter { limit: PAGE, ..ListFilter::default() };
    if let Some(text) = query.text("status") {
        filter.state = JobState::ALL.iter().copied().find(|state| state.as_str() == text);
        filter.status = Status::ALL.iter().copied().find(|status| status.as_str() == text);
        if filter.state.is_none() && filter.status.is_none() {
            return Err(Problem::bad_request(format!("`status`: one of {} is expected", statuses())));
        }
    }
    if let Some(text) = query.text("label") {
        let (name, value) = text
            .split_once(':')
            .ok_or_else(|| Problem::bad_request("`label`: NAME:VALUE is expected, such as tenant:acme"))?;
        filter.label = Some((name.to_owned(), value.to_owned()));
    }
    filter.after = query.field::<JobId>("after", "the id of a job")?;
    if let Some(limit) = query.field::<usize>("limit", "a number of jobs")? {
        if !(1..=MOST).contains(&limit) {
            return Err(Problem::bad_request(format!("`limit`: 1..={MOST} is possible, not {limit}")));
        }
        filter.limit = limit;
    }
    Ok(filter)
}

fn statuses() -> String {
    let states = JobState::ALL.iter().map(|state| state.as_str());
    let all: Vec<&str> = states.chain(Status::ALL.iter().map(|status| status.as_str())).collect();
    all.join(", ")
}

fn shortened(mut view: JobView) -> JobView {
    if let Some(result) = &mut view.result {
        shorten(result);
    }
    view
}

fn shorten(result: &mut JobResult) {
    cut(&mut result.stdout);
    cut(&mut result.stderr);
    for step in &mut result.steps {
        cut(&mut step.stdout);
        cut(&mut step.stderr);
    }
    if !result.outputs.files.is_empty() {
        result.outputs.files.clear();
        result.outputs.truncated = true;
    }
}

fn cut(output: &mut Captured) {
    if output.data.len() > OUTPUT {
        output.data.truncate(OUTPUT);
        output.truncated = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(query: &str) -> Result<ListFilter, Problem> {
        let uri = format!("/v1/jobs?{query}").parse().expect("uri");
        filter(&Query::of(&uri, &["status", "label", "after", "limit"])?)
    }

    #[test]
    fn a_query_becomes_a_filter() {
        let id = JobId::generate();
        let filter = of(&format!("status=running&label=tenant:a:b&after={id}&limit=7")).expect("filter");
        assert_eq!(filter.state, Some(JobState::Running));
        assert_eq!(filter.label, Some(("tenant".to_owned(), "a:b".to_owned())));
        assert_eq!((filter.after, filter.limit), (Some(id), 7));
        assert_eq!(of("status=limit_exceeded").expect("filter").status, Some(Status::LimitExceeded));
        assert_eq!(of("status=").expect("filter").limit, PAGE);
    }

    #[test]
    fn a_wrong_query_is_told_what_would_be_right() {
        for (query, word) in [
            ("status=done", "succeeded"),
            ("label=x", "NAME:VALUE"),
            ("after=1", "id of a job"),
            ("limit=0", "1..=500"),
            ("limit=x", "number"),
            ("colour=red", "`colour`"),
            ("label=a:b&label=c:d", "`label` is given twice"),
        ] {
            let problem = of(query).expect_err(query);
            assert!(problem.detail.contains(word), "{query}: {}", problem.detail);
        }
    }
}
