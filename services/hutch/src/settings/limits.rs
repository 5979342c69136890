//! `worker.default_limits` and `worker.max_limits`: the names of the wire, values in human units.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{anyhow, bail};
use hutch_proto::units::{ByteSize, Millis};
use hutch_proto::{LimitPolicy, LimitsSpec};
use serde::Deserialize;
use serde_json::Value;

use super::keys;

/// Limits as they stand in a config.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(transparent)]
pub(crate) struct LimitTable(BTreeMap<String, NumberOrText>);

/// A file gives numbers or text, the environment text alone.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

/// The policy of these two tables. A default above its maximum is brought down to it, so that a job
/// that says nothing is never refused; one that the config itself sets too high is an error.
pub(super) fn policy(defaults: &LimitTable, maximums: &LimitTable) -> anyhow::Result<LimitPolicy> {
    let defaults = spec("worker.default_limits", defaults)?;
    let maximums = spec("worker.max_limits", maximums)?;
    let most: BTreeMap<&str, u64> = maximums.given().collect();
    for (name, value) in defaults.given() {
        if let Some(most) = most.get(name).filter(|most| value > **most) {
            bail!("worker.default_limits.{name}: {value} is above worker.max_limits.{name}, which is {most}");
        }
    }
    let mut lowered = serde_json::Map::new();
    for (name, value) in defaults.over(&LimitsSpec::contract_defaults()).given() {
        let value = most.get(name).map_or(value, |most| value.min(*most));
        lowered.insert(name.to_owned(), value.into());
    }
    let lowered: LimitsSpec = serde_json::from_value(Value::Object(lowered))?;
    Ok(LimitPolicy { defaults: lowered.over(&defaults), maximums })
}

fn spec(path: &str, table: &LimitTable) -> anyhow::Result<LimitsSpec> {
    let mut values = serde_json::Map::new();
    for (name, value) in &table.0 {
        if !keys::limits().contains(name) {
            let meant = keys::nearest(&format!("{path}.{name}"))
                .map(|near| format!(": `{near}` is likely meant"))
                .unwrap_or_default();
            bail!("unknown key `{path}.{name}`{meant}; `hutch config show` lists all keys");
        }
        values.insert(name.clone(), number(name, value).map_err(|error| anyhow!("{path}.{name}: {error}"))?);
    }
    serde_json::from_value(Value::Object(values)).map_err(|error| anyhow!("{path}: {error}"))
}

/// A limit in the unit of its name.
fn number(name: &str, value: &NumberOrText) -> Result<Value, String> {
    let text = match value {
        NumberOrText::Number(number) => return Ok((*number).into()),
        NumberOrText::Text(text) => text,
    };
    if name == "cpuset" || name == "output_overflow" {
        return Ok(text.as_str().into());
    }
    if name.ends_with("_bytes") || name.ends_with("_bytes_per_s") {
        return ByteSize::from_str(text).map(|size| size.0.into());
    }
    if name.ends_with("_ms") {
        return Millis::from_str(text).map(|time| time.0.into());
    }
    text.trim().parse::<u64>().map(Value::from).map_err(|_| format!("`{text}` is not a whole number"))
}
