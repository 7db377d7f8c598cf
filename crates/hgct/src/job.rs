//! A job with the documents that it names.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use hgct_core::canonical;
use hgct_core::job::JobSpec;
use hgct_core::model::ModelSpec;
use hgct_data::ngram::{self, Baselines};
use hgct_data::prepare::Phase;
use hgct_data::{Options, Prepared, Sources, TokenFile, TokenizerChoice, registry};
use serde::{Deserialize, Serialize};

use crate::output::print;
use crate::workspace::Workspace;

/// Bytes of text on which a tokenizer is trained at most.
const TOKENIZER_BYTES: u64 = 8 << 20;

/// Marks a path that stands for the sources, in cargo's own registry folder, of the packages that a
/// `Cargo.lock` names.
const CRATES: &str = "crates:";

/// A job, read and checked.
#[derive(Debug, Clone)]
pub(crate) struct LoadedJob {
    pub(crate) path: PathBuf,
    pub(crate) job: JobSpec,
    pub(crate) model: ModelSpec,
    /// Text in place of the job's own, from the command line.
    other_data: Vec<String>,
}

/// What the child process that prepares data answers with.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PreparedData {
    pub(crate) prepared: Prepared,
    /// Losses of count models on the held-out tokens.
    pub(crate) baselines: Option<Baselines>,
}

impl LoadedJob {
    /// Reads `job.toml` and its `config.json`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let job = JobSpec::from_toml(&path.to_string_lossy(), &read(path)?).map_err(|error| match error {
            // The only one that does not name its file.
            hgct_core::Error::NotYet { .. } => anyhow!(error).context(path.display().to_string()),
            error => error.into(),
        })?;
        let config = folder(path).join(&job.model.config);
        let model = ModelSpec::from_config_json(&config.to_string_lossy(), &read(&config)?)?;
        if job.recipe.seq_len > model.max_position {
            bail!(
                "{}: `recipe.seq_len` is {}, but must be at most max_position_embeddings = {} of {}",
                path.display(),
                job.recipe.seq_len,
                model.max_position,
                config.display()
            );
        }
        Ok(Self { path: path.to_owned(), job, model, other_data: Vec::new() })
    }

    /// Puts other text in place of the job's, if any is named. Paths are relative to the current
    /// folder.
    pub(crate) fn with_data(mut self, paths: &[String]) -> Result<Self> {
        if paths.is_empty() {
            return Ok(self);
        }
        for path in paths {
            let absolute =
                std::path::absolute(path).with_context(|| format!("cannot resolve --data {path}"))?;
            self.other_data.push(absolute.to_string_lossy().into_owned());
        }
        self.job.data.paths.clone_from(&self.other_data);
        Ok(self)
    }

    /// Text in place of the job's own, as absolute paths.
    pub(crate) fn other_data(&self) -> &[String] {
        &self.other_data
    }

    /// Tokenizes the job's text in a child process, unless that was done before.
    pub(crate) fn prepare_data(&self, workspace: &Workspace) -> Result<PreparedData> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = std::process::Command::new(program);
        // SAFETY: `prctl` with these arguments only sets a flag of the new process, which is allowed
        // between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        // The thread that starts it waits for it: its death is the command's.
        let child = command
            .args(["--dir"])
            .arg(workspace.root())
            .args(["data", "--json"])
            .arg(&self.path)
            .args(self.other_data.iter().flat_map(|path| ["--data", path.as_str()]))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the process that prepares data")?;
        let output = child.wait_with_output().context("the process that prepares data is lost")?;
        if !output.status.success() {
            return Err(DataFailed { code: output.status.code() }.into());
        }
        serde_json::from_slice(&output.stdout).context("the process that prepares data answered badly")
    }

    /// The files of the job's text; an error where a path leads to none.
    pub(crate) fn sources(&self) -> Result<Sources> {
        let base = folder(&self.path);
        let mut files = Vec::new();
        let mut patterns = Vec::new();
        for path in &self.job.data.paths {
            match path.strip_prefix(CRATES) {
                Some(lock) => files.extend(self.crate_sources(&base.join(lock))?),
                None => patterns.push(expand(path)?),
            }
        }
        // A file that is named by itself may not be empty, as one of a folder may.
        if files.is_empty() {
            return Ok(Sources::resolve(&patterns, &base)?);
        }
        if !patterns.is_empty() {
            files.extend(Sources::resolve(&patterns, &base)?.files().iter().map(|file| file.path.clone()));
        }
        Ok(Sources::from_files(files))
    }

    fn crate_sources(&self, lock: &Path) -> Result<Vec<PathBuf>> {
        let packages: BTreeSet<String> = registry::locked_packages(lock)?;
        let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
        let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
        let home = home
            .ok_or_else(|| anyhow!("neither CARGO_HOME nor HOME is set: name text files with data.paths"))?;
        let bytes = self.job.data.max_bytes.unwrap_or(u64::MAX);
        let sources = registry::quickstart_sources(&home.join("registry/src"), Some(&packages), bytes)?;
        Ok(sources.files().iter().map(|file| file.path.clone()).collect())
    }
}

/// The child process that prepares data has said on standard error why it failed.
#[derive(Debug, thiserror::Error)]
#[error("the data cannot be prepared")]
pub(crate) struct DataFailed {
    /// Its exit code.
    pub(crate) code: Option<i32>,
}

/// `hgct data`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hgct data examples/quickstart/job.toml")]
pub(crate) struct DataArgs {
    /// The job whose text becomes token files
    job: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Text in place of the job's own: a file, folder or pattern; may be repeated
    #[arg(long, value_name = "PATH")]
    data: Vec<String>,
}

/// Tokenizes a job's text in this process.
pub(crate) fn prepare_data(workspace: &Workspace, args: &DataArgs) -> Result<u8> {
    let loaded = LoadedJob::read(&args.job)?.with_data(&args.data)?;
    let data = &loaded.job.data;
    let tokenizer = match &data.tokenizer {
        Some(path) => TokenizerChoice::Given { path: folder(&args.job).join(path), end_of_text: None },
        None => TokenizerChoice::Train { vocab_size: loaded.model.vocab_size, train_bytes: TOKENIZER_BYTES },
    };
    let options = Options {
        sources: loaded.sources()?,
        tokenizer,
        held_out: data.held_out,
        max_bytes: data.max_bytes,
        threads: std::thread::available_parallelism().map_or(2, usize::from),
        cache: workspace.data(),
    };
    let mut phase = None;
    let prepared = hgct_data::prepare(&options, &mut |progress| {
        if phase.replace(progress.phase) != Some(progress.phase) {
            let doing = match progress.phase {
                Phase::Scan => "reading the text".into(),
                Phase::TrainTokenizer => {
                    format!("training a tokenizer on {:.1} MB", progress.total as f64 / 1e6)
                }
                Phase::Encode => format!("tokenizing {:.1} MB", progress.total as f64 / 1e6),
            };
            eprintln!("data: {doing}");
        }
    })?;
    if prepared.meta.vocab_size > loaded.model.vocab_size {
        bail!(
            "the tokenizer has {} tokens, but `vocab_size` of {} is {}",
            prepared.meta.vocab_size,
            loaded.job.model.config,
            loaded.model.vocab_size
        );
    }
    let seq_len = loaded.job.recipe.seq_len;
    let baselines = if prepared.meta.held_out_tokens > u64::from(seq_len) {
        Some(ngram::baselines(
            &TokenFile::open(&prepared.train_path())?,
            &TokenFile::open(&prepared.held_out_path())?,
            seq_len,
        )?)
    } else {
        None
    };
    let answer = PreparedData { prepared, baselines };
    if args.json {
        print(&canonical::encode(&answer))?;
    } else {
        let meta = &answer.prepared.meta;
        print(&format!(
            "{} tokens to train on, {} held out, vocabulary {}, in {}\n",
            meta.train_tokens,
            meta.held_out_tokens,
            meta.vocab_size,
            answer.prepared.folder.display()
        ))?;
    }
    Ok(0)
}

/// The folder of a file, for paths relative to it.
fn folder(path: &Path) -> PathBuf {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// Replaces a leading `${NAME}` by the variable's value.
fn expand(path: &str) -> Result<String> {
    let Some((name, rest)) = path.strip_prefix("${").and_then(|rest| rest.split_once('}')) else {
        return Ok(path.to_owned());
    };
    let value =
        std::env::var(name).with_context(|| format!("data.paths names ${{{name}}}, which is not set"))?;
    Ok(format!("{value}{rest}"))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
