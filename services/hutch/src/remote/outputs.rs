//! `hutch outputs`: the files that a job left.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use futures::StreamExt;
use hutch_layers::Hasher;
use hutch_proto::{Archive, OutputKind, Outputs};
use reqwest::Method;

use super::client::Client;
use crate::cli::OutputsArgs;
use crate::term::Waiting;
use crate::{term, unpack, verdict};

/// Lists them, or unpacks them.
pub(crate) async fn outputs(args: OutputsArgs) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.client)?;
    let outputs: Outputs = client.json(&format!("/v1/jobs/{}/outputs", args.id)).await?;
    if args.json {
        term::line(serde_json::to_string_pretty(&outputs).context("the outputs cannot be shown")?);
    }
    if let Some(directory) = &args.extract {
        extract(&client, &outputs, directory).await?;
    } else if !args.json {
        term::text(list(&outputs));
    }
    if outputs.truncated {
        term::note("there was more than is kept");
    }
    Ok(ExitCode::SUCCESS)
}

fn list(outputs: &Outputs) -> String {
    let line = |file: &hutch_proto::OutputFile| {
        let mode = file.mode.map(String::from).unwrap_or_else(|| "-".to_owned());
        let kind = match file.kind {
            OutputKind::File => "file",
            OutputKind::Dir => "dir",
            OutputKind::Symlink => "symlink",
            OutputKind::Deleted => "deleted",
            OutputKind::Special => "special",
        };
        let target = file.target.as_ref().map(|target| format!(" -> {target}")).unwrap_or_default();
        format!(
            "{kind:<8} {mode:<5} {:>10}  {}\n",
            verdict::size(file.bytes),
            term::safe_line(&format!("{}{target}", file.path))
        )
    };
    outputs.files.iter().map(line).collect()
}

async fn extract(client: &Client, outputs: &Outputs, directory: &Path) -> anyhow::Result<()> {
    let Some(archive) = &outputs.archive else {
        bail!("the job left no files: name what is to be kept in outputs.paths of its spec");
    };
    let file = fetch(client, archive).await?;
    let unpacked = unpack::unpack(file, directory)?;
    for skipped in &unpacked.skipped {
        term::note(format!("left out: {}", term::safe_line(skipped)));
    }
    term::note(format!("{} entries are in {}", unpacked.entries, directory.display()));
    Ok(())
}

/// The archive, in a file without a name; its bytes are those that the result names.
async fn fetch(client: &Client, archive: &Archive) -> anyhow::Result<File> {
    let answer = client.ask(Method::GET, &format!("/v1/blobs/{}", archive.blob), None).await?;
    let mut pieces = answer.bytes_stream();
    let mut file = tempfile::tempfile().context("no temporary file can be made")?;
    let mut hasher = Hasher::new();
    let mut waiting = Waiting::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece.context("the archive broke off")?;
        hasher.update(&piece);
        if hasher.bytes() > archive.bytes {
            bail!("the archive is larger than the result says");
        }
        waiting.show(format!(
            "fetching the archive, {} of {}",
            verdict::size(hasher.bytes()),
            verdict::size(archive.bytes)
        ));
        file.write_all(&piece).context("the archive cannot be written")?;
    }
    let found = hasher.finish();
    if found != archive.blob {
        bail!("the archive is damaged: its digest is {found}, not {}", archive.blob);
    }
    file.rewind().context("the archive cannot be read")?;
    Ok(file)
}
