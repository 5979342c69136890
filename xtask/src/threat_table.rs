//! The table of attacks in docs/threat-model.md: one row for each test of tests/tests/hostile.
//!
//! The tests write a line of JSON for each attack that they tried (`HUTCH_HOSTILE_TABLE`); merging puts them in place of
//! the rows of the same tests, and keeps on which other kernels those were seen to hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde_json::Value;

const DOCUMENT: &str = "docs/threat-model.md";
const TESTS: &str = "tests/tests/hostile";
const BEGIN: &str = "<!-- attacks: begin; `cargo xtask threat-table` writes this -->\n";
const END: &str = "<!-- attacks: end -->\n";
const HEAD: &str =
    "| attack | what stops it | test | control | without it | held on |\n|---|---|---|---|---|---|\n";

/// One attack.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    attack: String,
    defence: String,
    control: String,
    bite: String,
    /// Kernel and cgroup version, each once.
    held_on: BTreeSet<String>,
}

type Rows = BTreeMap<String, Row>;

/// Merges what tests wrote into the document.
pub(crate) fn merge(files: &[PathBuf]) -> anyhow::Result<()> {
    let text = fs::read_to_string(DOCUMENT).context(DOCUMENT)?;
    let mut rows = rows(&text)?;
    for file in files {
        let lines = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        for line in lines.lines() {
            add(&mut rows, &serde_json::from_str(line).with_context(|| line.to_owned())?)?;
        }
    }
    let tests = tests()?;
    rows.retain(|test, _| tests.contains(test));
    fs::write(DOCUMENT, with_rows(&text, &rows)?)?;
    eprintln!("{DOCUMENT}: {} attacks", rows.len());
    Ok(())
}

/// Every test has a row, and every row a test.
pub(crate) fn complete() -> anyhow::Result<()> {
    let rows: BTreeSet<_> = rows(&fs::read_to_string(DOCUMENT).context(DOCUMENT)?)?.into_keys().collect();
    let tests = tests()?;
    let hint = "run the hostile tests with HUTCH_HOSTILE_TABLE=FILE, then `cargo xtask threat-table FILE`";
    if let Some(test) = tests.difference(&rows).next() {
        bail!("{DOCUMENT} has no row for {test}; {hint}");
    }
    if let Some(row) = rows.difference(&tests).next() {
        bail!("{DOCUMENT} has a row for {row}, which is no test; {hint}");
    }
    Ok(())
}

/// The names of the tests: functions `aNN_…`.
fn tests() -> anyhow::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(TESTS).context(TESTS)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(fs::read_to_string(path)?.lines().filter_map(test_name).map(str::to_owned));
        }
    }
    Ok(names)
}

fn test_name(line: &str) -> Option<&str> {
    let name = line.strip_prefix("fn ")?.split('(').next()?;
    let number = name.strip_prefix('a')?.split('_').next()?;
    (number.len() >= 2 && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
}

fn parts(text: &str) -> anyhow::Result<(&str, &str, &str)> {
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("{DOCUMENT} has no `{BEGIN}`"))?;
    let (table, after) = rest.split_once(END).with_context(|| format!("{DOCUMENT} has no `{END}`"))?;
    Ok((before, table, after))
}

fn rows(text: &str) -> anyhow::Result<Rows> {
    let (_, table, _) = parts(text)?;
    table
        .lines()
        .skip(2)
        .map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            let [attack, defence, test, control, bite, held_on] = cells[..] else {
                bail!("{DOCUMENT}: this is no row of six: {line}");
            };
            let [attack, defence, control, bite] = [attack, defence, control, bite].map(str::to_owned);
            let held_on = held_on.split(", ").filter(|held| !held.is_empty()).map(str::to_owned).collect();
            Ok((test.trim_matches('`').to_owned(), Row { attack, defence, control, bite, held_on }))
        })
        .collect()
}

/// Adds what a test wrote. One that was skipped replaces nothing.
fn add(rows: &mut Rows, line: &Value) -> anyhow::Result<()> {
    let text = |name: &str| {
        let text = line[name].as_str().with_context(|| format!("no `{name}` in {line}"));
        text.map(|text| text.replace('|', "/"))
    };
    let (test, held_on) = (text("test")?, text("held_on")?);
    let fresh = Row {
        attack: text("attack")?,
        defence: text("defence")?,
        control: text("control")?,
        bite: text("bite")?,
        held_on: BTreeSet::new(),
    };
    let row = rows.entry(test).or_insert_with(|| fresh.clone());
    row.attack = fresh.attack;
    row.defence = fresh.defence;
    if held_on.is_empty() && !row.held_on.is_empty() {
        return Ok(());
    }
    row.control = fresh.control;
    if !fresh.bite.starts_with("skipped") || row.bite.is_empty() {
        row.bite = fresh.bite;
    }
    row.held_on.extend(Some(held_on).filter(|held| !held.is_empty()));
    Ok(())
}

fn with_rows(text: &str, rows: &Rows) -> anyhow::Result<String> {
    let (before, _, after) = parts(text)?;
    let mut table = HEAD.to_owned();
    for (test, row) in rows {
        let held_on: Vec<_> = row.held_on.iter().map(String::as_str).collect();
        table.push_str(&format!(
            "| {} | {} | `{test}` | {} | {} | {} |\n",
            row.attack,
            row.defence,
            row.control,
            row.bite,
            held_on.join(", ")
        ));
    }
    Ok(format!("{before}{BEGIN}{table}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"test": "a01_x", "attack": "1: tries | this", "defence": "that", "control": "works outside",
        "bite": "goes through", "held_on": "6.18 v1"}"#;

    fn document() -> String {
        format!("before\n{BEGIN}{HEAD}{END}after\n")
    }

    #[test]
    fn rows_of_other_kernels_are_kept() {
        let mut rows = rows(&document()).expect("empty");
        let mut line: Value = serde_json::from_str(LINE).expect("json");
        add(&mut rows, &line).expect("added");
        line["held_on"] = "6.1 v2".into();
        line["bite"] = "skipped: no weak binary".into();
        add(&mut rows, &line).expect("added");
        line["held_on"] = "".into();
        line["control"] = "skipped: no such call".into();
        add(&mut rows, &line).expect("added");
        let text = with_rows(&document(), &rows).expect("written");
        assert!(
            text.contains(
                "| 1: tries / this | that | `a01_x` | works outside | goes through | 6.1 v2, 6.18 v1 |\n"
            ),
            "{text}"
        );
        assert_eq!(super::rows(&text).expect("read back"), rows);
        assert!(text.starts_with("before\n") && text.ends_with("after\n"));
    }

    #[test]
    fn tests_are_told_from_other_functions() {
        assert_eq!(test_name("fn a01_overwrites() {"), Some("a01_overwrites"));
        assert_eq!(test_name("fn answers(text: &str) {"), None);
        assert_eq!(test_name("fn a1_x() {"), None);
        assert_eq!(test_name("    fn a01_inner() {"), None);
    }
}
