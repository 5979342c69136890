//! System calls that `attempt.c` tries, inside and outside.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::OnceLock;

use hutch_tests::programs::{self, Program};
use serde_json::json;

use crate::attack::{Attack, Outcome};
use crate::site::{Site, job};

type Answers = BTreeMap<String, String>;

fn answers(text: &str) -> Answers {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, answer)| (name.to_owned(), answer.to_owned()))
        .collect()
}

/// What root is answered outside.
fn outside() -> Result<&'static Answers, String> {
    static OUTSIDE: OnceLock<Result<Answers, String>> = OnceLock::new();
    let ask = || {
        let program = programs::on_host(Program::Attempt).ok_or("there is no C compiler")?;
        let output = Command::new(program).arg("outside").output().map_err(|e| e.to_string())?;
        Ok(answers(&String::from_utf8_lossy(&output.stdout)))
    };
    OUTSIDE.get_or_init(ask).as_ref().map_err(Clone::clone)
}

/// Whether an answer is that of a call that is refused or not there.
fn is_refused(answer: &str) -> bool {
    matches!(answer, "EPERM" | "ENOSYS" | "EAFNOSUPPORT" | "EACCES" | "EROFS") || answer.starts_with("SIG")
}

/// Those of the names that root is not refused outside: only they prove anything.
fn telling(names: &[&str]) -> Vec<String> {
    let Ok(outside) = outside() else { return Vec::new() };
    let told = |name: &&&str| outside.get(**name).is_some_and(|answer| !is_refused(answer));
    names.iter().filter(told).map(|name| (*name).to_owned()).collect()
}

/// The control: which of these calls are there, outside.
pub(crate) fn exist(names: &'static [&'static str]) -> Result<String, String> {
    let outside = outside()?;
    let telling = telling(names);
    for name in names.iter().filter(|name| !telling.iter().any(|told| told == **name)) {
        let answer = outside.get(*name).map_or("nothing", String::as_str);
        hutch_tests::skip(
            &format!("{} by {name}", crate::attack::test_name()),
            &format!("it is answered {answer} outside too"),
        );
    }
    if telling.is_empty() {
        Err("none of these calls works outside either".to_owned())
    } else {
        Ok(format!("{} of {} calls work", telling.len(), names.len()))
    }
}

/// Tries them all as root and as an ordinary user; what is not refused got through.
pub(crate) fn strike(site: &Site, names: &[&str]) -> Outcome {
    let telling = telling(names);
    let mut through = Vec::new();
    for user in ["1001:1001", "root"] {
        let program = programs::inside(Program::Attempt);
        let inside = answers(&site.stdout(&job(&[&program], &json!({"user": user}))));
        let passed =
            telling.iter().filter(|name| !inside.get(*name).is_some_and(|answer| is_refused(answer)));
        through.extend(passed.map(|name| format!("{name} as {user}: {:?}", inside.get(name))));
    }
    Outcome::of(&through, format!("{} calls are refused", telling.len()))
}

/// An attack that is nothing but system calls.
pub(crate) fn attack(
    what: &'static str,
    stopped_by: &'static str,
    names: &'static [&'static str],
) -> Attack<'static> {
    Attack::new(what, stopped_by, move |site| strike(site, names)).control(move || exist(names))
}
