//! One attack: its control, what must be seen, that it bites, and what must be as before.
//!
//! In order: the control shows that what is tried works on this kernel outside of a sandbox, or the test is skipped
//! aloud; a service of its own takes the attack as a job (or several), which must be held; host, worker and launcher
//! are looked at and must be as before, the next job must run, and the metrics answer; last, the same attack is
//! made on the tests' own binary with the defence taken away, and must go through. A line for each test goes to the
//! file that `HUTCH_HOSTILE_TABLE` names.

use std::io::Write as _;

use hutch_sandbox::Defence;
use hutch_tests::house::House;
use serde_json::json;

use crate::site::{Kind, Site, host_settings};

/// What came of an attack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It got nowhere; what it was answered.
    Held(String),
    /// It got what it wanted.
    Through(String),
}

impl Outcome {
    /// Held unless something got through: what did.
    pub(crate) fn of(through: &[String], held: impl Into<String>) -> Self {
        if through.is_empty() { Self::Held(held.into()) } else { Self::Through(through.join(", ")) }
    }

    /// Held if this holds, and what was seen in any case.
    pub(crate) fn held_if(held: bool, seen: impl Into<String>) -> Self {
        if held { Self::Held(seen.into()) } else { Self::Through(seen.into()) }
    }
}

/// How it is shown that the test would fail without the defence.
#[derive(Debug)]
enum Bite {
    /// With these taken away it goes through.
    Without(&'static [Defence]),
    /// There is nothing to take away, for this reason.
    Nothing(&'static str),
}

type Control<'a> = Box<dyn FnOnce() -> Result<String, String> + 'a>;
type Strike<'a> = Box<dyn Fn(&Site) -> Outcome + 'a>;

/// An attack that is being described.
pub(crate) struct Attack<'a> {
    what: &'static str,
    stopped_by: &'static str,
    bite: Bite,
    control: Option<Control<'a>>,
    strike: Strike<'a>,
    more: Vec<(&'static str, String)>,
}

impl<'a> Attack<'a> {
    /// What it tries, what stops it, and how: the closure makes it on whichever binary the site has.
    pub(crate) fn new(
        what: &'static str,
        stopped_by: &'static str,
        strike: impl Fn(&Site) -> Outcome + 'a,
    ) -> Self {
        let strike = Box::new(strike);
        Self { what, stopped_by, bite: Bite::Without(&[]), control: None, strike, more: Vec::new() }
    }

    /// That it works outside of a sandbox: what was seen there, or why nothing can be shown here.
    pub(crate) fn control(mut self, control: impl FnOnce() -> Result<String, String> + 'a) -> Self {
        self.control = Some(Box::new(control));
        self
    }

    /// The defences without which it goes through.
    pub(crate) fn bites_without(mut self, defences: &'static [Defence]) -> Self {
        self.bite = Bite::Without(defences);
        self
    }

    /// Why there is nothing that could be taken away.
    pub(crate) fn has_no_switch(mut self, why: &'static str) -> Self {
        self.bite = Bite::Nothing(why);
        self
    }

    /// A variable in the environment of the service.
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.more.push((name, value.into()));
        self
    }

    /// Does it all.
    pub(crate) fn run(self) {
        let test = test_name();
        let Some(house) = House::with_sandboxes() else {
            return record(&test, &self, "skipped: no sandboxes here", "", "");
        };
        let control = self.control.map_or_else(|| Ok("-".to_owned()), |control| control());
        let this = Attack { control: None, ..self };
        let control = match control {
            Ok(seen) => seen,
            Err(why) => {
                hutch_tests::skip(&test, &why);
                return record(&test, &this, &format!("skipped: {why}"), "", "");
            }
        };
        let settings = host_settings();
        let site = Site::open(&house, Kind::Product, &this.more);
        let before = site.figures();
        let outcome = (this.strike)(&site);
        assert!(matches!(outcome, Outcome::Held(_)), "{test} got through: {outcome:?}");
        site.is_as_before(&before);
        assert_eq!(host_settings(), settings, "the host's settings");
        site.close();
        let bite = this.bite(&test);
        assert_eq!(host_settings(), settings, "the host's settings");
        record(&test, &this, &control, &bite, &crate::site::host());
    }

    /// Shows that it goes through without the defence; how, or why that was not shown.
    fn bite(&self, test: &str) -> String {
        let defences = match self.bite {
            Bite::Without(defences) => defences,
            Bite::Nothing(why) => return format!("not shown: {why}"),
        };
        let names = defences.iter().map(|defence| defence.name()).collect::<Vec<_>>().join(",");
        let binary = match hutch_tests::hutch::weak_binary() {
            Ok(binary) => binary,
            Err(why) => {
                hutch_tests::skip(&format!("{test} without {names}"), &why);
                return format!("skipped: {why}");
            }
        };
        let house = House::new();
        let site = Site::open(&house, Kind::Weak(binary, names.clone()), &self.more);
        let outcome = (self.strike)(&site);
        assert!(matches!(outcome, Outcome::Through(_)), "{test} is held even without {names}: {outcome:?}");
        format!("{}: goes through", names.replace(',', " and "))
    }
}

/// The name of the test that runs.
pub(crate) fn test_name() -> String {
    let thread = std::thread::current();
    thread.name().and_then(|name| name.rsplit("::").next()).unwrap_or("a test").to_owned()
}

/// An attack that cannot be tried yet; counted among those that were skipped.
pub(crate) fn skipped(what: &'static str, stopped_by: &'static str, why: &str) {
    let test = test_name();
    hutch_tests::skip(&test, why);
    let attack = Attack::new(what, stopped_by, |_| Outcome::Held(String::new()));
    record(&test, &attack, &format!("skipped: {why}"), "", "");
}

/// Writes the test's line for the table.
fn record(test: &str, attack: &Attack<'_>, control: &str, bite: &str, held_on: &str) {
    let Some(path) = std::env::var_os("HUTCH_HOSTILE_TABLE") else { return };
    let line = json!({
        "test": test, "attack": attack.what, "defence": attack.stopped_by, "control": control, "bite": bite,
        "held_on": held_on,
    });
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
}
