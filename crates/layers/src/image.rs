//! Images: their names, and what a job takes from their config.
//!
//! The config is that of the OCI image specification (config.md); a Docker archive has the same.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use hutch_proto::{Digest, JobPath, JobSpec};
use oci_client::Reference;
use serde::{Deserialize, Serialize};

/// An image's whole name: `registry/repository:tag`, or with `@sha256:…`.
///
/// A short one is that of Docker's registry: `python:3.12` is `docker.io/library/python:3.12`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageName(Reference);

impl ImageName {
    /// The name as a registry's client has it.
    pub(crate) fn reference(&self) -> &Reference {
        &self.0
    }
}

impl FromStr for ImageName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|e| {
            format!(
                "`{text}` is no name of an image: {e}; one such as docker.io/library/python:3.12 is expected"
            )
        })
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.whole())
    }
}

/// What a job takes from an image unless it says otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Program and arguments: the entry point, then the command.
    pub command: Vec<String>,
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// Working directory; none if the image names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Whom the image's programs run as, as the image has it. A job runs as its own `user` all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl ImageConfig {
    /// Gives a job what it leaves out.
    pub fn fill(&self, job: &mut JobSpec) {
        if job.command.is_none() && job.steps.is_empty() && !self.command.is_empty() {
            job.command = Some(self.command.clone());
        }
        for (name, value) in &self.env {
            job.env.entry(name.clone()).or_insert_with(|| value.clone());
        }
        if job.cwd.is_none() {
            // A path that a job could not have is not one that an image can give it.
            job.cwd = self.cwd.as_deref().and_then(|cwd| JobPath::try_from(cwd.to_owned()).ok());
        }
    }
}

/// The parts of an image's config file that count here.
#[derive(Debug, Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(default)]
    config: Option<RunConfig>,
    rootfs: RootFs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

impl ConfigFile {
    /// The diff ids of the layers, base first.
    pub(crate) fn diff_ids(&self) -> &[Digest] {
        &self.rootfs.diff_ids
    }

    /// What a job takes from it.
    pub(crate) fn image_config(self) -> ImageConfig {
        let run = self.config.unwrap_or_default();
        let mut command = run.entrypoint.unwrap_or_default();
        command.extend(run.cmd.unwrap_or_default());
        let pair =
            |text: String| text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        ImageConfig {
            command,
            env: run.env.unwrap_or_default().into_iter().filter_map(pair).collect(),
            cwd: given(run.working_dir),
            user: given(run.user),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_those_of_dockers_registry() {
        for (short, whole) in [
            ("python:3.12", "docker.io/library/python:3.12"),
            ("busybox", "docker.io/library/busybox:latest"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        ] {
            assert_eq!(short.parse::<ImageName>().expect(short).to_string(), whole);
        }
        assert!("Not A Name".parse::<ImageName>().expect_err("spaces").contains("is expected"));
    }

    #[test]
    fn a_job_takes_what_it_leaves_out() {
        let text = r#"{"architecture": "amd64", "os": "linux",
            "config": {"Env": ["PATH=/opt/bin", "A=image"], "Entrypoint": ["sh", "-c"], "Cmd": ["id"], "WorkingDir": "/srv"},
            "rootfs": {"type": "layers", "diff_ids": []}}"#;
        let file: ConfigFile = serde_json::from_str(text).expect("config");
        let config = file.image_config();
        let mut job = JobSpec::parse(br#"{"layers": ["image:x"], "env": {"A": "job"}}"#).expect("job");
        config.fill(&mut job);
        assert_eq!(job.command.as_deref(), Some(&["sh", "-c", "id"].map(str::to_owned)[..]));
        assert_eq!((job.env["A"].as_str(), job.env["PATH"].as_str()), ("job", "/opt/bin"));
        assert_eq!(job.cwd.map(|cwd| cwd.to_string()).as_deref(), Some("/srv"));
        let mut job =
            JobSpec::parse(br#"{"layers": ["image:x"], "command": ["true"], "cwd": "/"}"#).expect("job");
        config.fill(&mut job);
        assert_eq!(job.command.as_deref(), Some(&["true".to_owned()][..]));
        assert_eq!(job.cwd.map(|cwd| cwd.to_string()).as_deref(), Some("/"));
    }
}
