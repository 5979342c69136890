//! System calls that lead out of a sandbox, or into parts of the kernel with a long record of faults.

use std::collections::BTreeMap;
use std::process::Command;

use hutch_tests::programs::{self, Program};
use serde_json::json;

use crate::{can_run, job, output};

/// What is tried, and what a program must be answered.
type Answers = BTreeMap<String, String>;

fn answers(text: &str) -> Answers {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, answer)| (name.to_owned(), answer.to_owned()))
        .collect()
}

/// The answer that each attempt must get inside.
fn wanted(name: &str) -> &'static [&'static str] {
    match name {
        // Its flags are behind a pointer, where no filter sees them: programs fall back to clone.
        "clone3_user" | "i386" | "x32" => &["ENOSYS"],
        "own_filter" | "own_filter_prctl" => &["EINVAL"],
        "socket_raw" => &["EPERM"],
        _ if name.starts_with("socket_") => &["EAFNOSUPPORT"],
        _ if name.starts_with("write_") => &["EROFS", "EACCES"],
        _ => &["EPERM"],
    }
}

/// Answers that say nothing of our defences, since everybody outside gets them too.
fn proves_nothing(outside: &str) -> bool {
    matches!(outside, "EPERM" | "ENOSYS" | "EAFNOSUPPORT" | "EACCES" | "EROFS") || outside.starts_with("SIG")
}

#[test]
fn calls_that_lead_out_are_refused() {
    if !can_run("calls that lead out") {
        return;
    }
    let Some(attempt) = programs::on_host(Program::Attempt) else { return };
    let outside = Command::new(attempt).arg("outside").output().unwrap();
    assert!(outside.status.success(), "{}", String::from_utf8_lossy(&outside.stderr));
    let outside = answers(&String::from_utf8_lossy(&outside.stdout));
    let mut skipped = Vec::new();
    for user in ["1001:1001", "root"] {
        let path = programs::inside(Program::Attempt);
        let inside = answers(&output(&job(&[&path], &json!({"user": user}))));
        assert_eq!(inside.len(), outside.len(), "every attempt has an answer");
        assert!(inside.len() > 70, "{} attempts", inside.len());
        let let_through: Vec<_> = inside
            .iter()
            .filter(|(name, answer)| {
                let missing = name.starts_with("write_") && outside[*name] == "ENOENT";
                !wanted(name).contains(&answer.as_str()) && !missing
            })
            .map(|(name, answer)| format!("{name}: {answer}, not one of {:?}", wanted(name)))
            .collect();
        assert!(let_through.is_empty(), "as {user}: {let_through:#?}");
        skipped = outside.iter().filter(|(_, answer)| proves_nothing(answer)).collect();
    }
    for (name, answer) in skipped {
        hutch_tests::skip(name, &format!("this kernel answers {answer} outside too"));
    }
}

#[test]
fn threads_and_processes_still_work() {
    if !can_run("threads and processes") {
        return;
    }
    let text = crate::python(
        "import threading, subprocess, os, multiprocessing\n\
         done = []\n\
         threads = [threading.Thread(target=lambda n=n: done.append(n)) for n in range(20)]\n\
         [t.start() for t in threads]; [t.join() for t in threads]\n\
         print(len(done), subprocess.run(['echo', 'hi'], capture_output=True).stdout, os.system('exit 3') >> 8)\n\
         with multiprocessing.Pool(2) as pool: print(sum(pool.map(abs, range(-10, 0))))",
    );
    assert_eq!(text, "20 b'hi\\n' 3\n55\n");
}
