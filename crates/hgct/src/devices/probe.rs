//! Asking a framework which devices it reaches: in a child process with a deadline, so that a
//! missing, hanging or crashing runtime is an answer like any other.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hgct_core::canonical::{self, Hash};
use serde::{Deserialize, Serialize};

use crate::environments::Environment;
use crate::process;
use crate::vendors::EngineUse;

/// Runs in the environment's interpreter; needs the framework and nothing of ours.
const SCRIPT: &str = include_str!("../../../../python/hgct/probe.py");

/// What a framework says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Answer {
    /// Version of the interpreter.
    pub(crate) python: String,
    /// Version of the framework.
    pub(crate) version: String,
    /// The devices it reaches, in its own order.
    pub(crate) devices: Vec<Seen>,
    /// Shared libraries in its process.
    pub(crate) libraries: Vec<String>,
    /// Why there are none.
    error: Option<String>,
}

/// A device as a framework sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// The framework's number for it.
    pub(crate) index: u32,
    /// The framework's device string.
    pub(crate) device: String,
    /// What the framework calls it.
    pub(crate) name: Option<String>,
    /// Its UUID, where the framework tells.
    pub(crate) uuid: Option<String>,
    /// Its PCI address, where the framework tells.
    pub(crate) pci: Option<String>,
    /// Its memory, bytes, where the framework tells.
    pub(crate) memory_bytes: Option<u64>,
    /// Version of its driver, where the framework tells.
    #[serde(default)]
    pub(crate) driver: Option<String>,
    /// Whether it is a program on the processor.
    #[serde(default)]
    pub(crate) software: bool,
    /// Whether the user named this adapter, and so wants it whatever else drives the card.
    #[serde(default)]
    pub(crate) asked_for: bool,
    /// Why it cannot be used.
    #[serde(default)]
    pub(crate) error: Option<String>,
}

/// Asks one framework; `Err` is the reason why it cannot be used.
pub(crate) fn ask(
    environment: &Environment,
    driven: &EngineUse,
    variables: &BTreeMap<String, String>,
    deadline: Duration,
) -> Result<Answer, String> {
    let mut command = environment.command(variables, 1);
    if environment.is_native() {
        command.arg("--probe");
    } else {
        command.args(["-c", SCRIPT, &driven.engine, &driven.device]).args(&driven.imports);
    }
    let answer = run(&mut command, deadline)?;
    if let Some(error) = answer.error {
        return Err(error);
    }
    if answer.devices.is_empty() {
        return Err(format!("{} {} finds no such device", environment.engine, answer.version));
    }
    if !environment.framework_version.is_empty() && environment.framework_version != answer.version {
        return Err(format!(
            "the table of environments says {} {}, but {} is installed: run `python3 scripts/environments.py` again",
            environment.engine, environment.framework_version, answer.version
        ));
    }
    Ok(answer)
}

fn run(command: &mut Command, deadline: Duration) -> Result<Answer, String> {
    let interpreter = command.get_program().to_string_lossy().into_owned();
    let outcome = process::run_bounded(command, deadline).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            format!("there is no {interpreter}: run `python3 scripts/environments.py`")
        }
        _ => format!("{interpreter} does not start: {error}"),
    })?;
    let words = match outcome.last_words() {
        "" => String::new(),
        words => format!(", last words: {words}"),
    };
    match outcome.status {
        None => Err(format!("did not answer within {} s{words}", deadline.as_secs_f64())),
        Some(status) if !status.success() => {
            Err(format!("crashed with {}{words}", process::describe(status)))
        }
        Some(_) => serde_json::from_str(outcome.stdout.trim())
            .map_err(|error| format!("answered something that is not an answer ({error}){words}")),
    }
}

/// Answers that were good, kept by everything that they depend on.
#[derive(Debug)]
pub(crate) struct Cache<'a> {
    /// Where; `None`: nowhere.
    pub(crate) folder: Option<&'a Path>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    key: Hash,
    answer: Answer,
}

impl Cache<'_> {
    /// The key of a question: environment, vendor's data, hardware and the probe itself.
    pub(crate) fn key(environment: &Hash, question: &impl Serialize) -> Hash {
        Hash::of(&(environment, question, Hash::of_bytes(SCRIPT.as_bytes())))
    }

    /// A kept answer. Whatever does not read is as good as absent.
    pub(crate) fn get(&self, name: &str, key: &Hash) -> Option<Answer> {
        let text = std::fs::read_to_string(self.folder?.join(name)).ok()?;
        let kept: Kept = canonical::decode(name, &text).ok()?;
        (kept.key == *key).then_some(kept.answer)
    }

    /// Keeps an answer.
    pub(crate) fn put(&self, name: &str, key: Hash, answer: &Answer) -> io::Result<()> {
        let Some(folder) = self.folder else { return Ok(()) };
        std::fs::create_dir_all(folder)?;
        // Two commands may write it at once: each its own file, then one rename.
        let partial = folder.join(format!("{name}.{}.partial", std::process::id()));
        std::fs::write(&partial, canonical::encode(&Kept { key, answer: answer.clone() }))?;
        std::fs::rename(partial, folder.join(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<Answer, String> {
        let mut command = Command::new("/bin/sh");
        run(command.args(["-c", script]), Duration::from_secs(20))
    }

    #[test]
    fn whatever_a_runtime_does_is_a_reason() {
        assert_eq!(shell("kill -SEGV $$").unwrap_err(), "crashed with signal 11 (SIGSEGV)");
        assert_eq!(
            shell("echo no module named x >&2; exit 1").unwrap_err(),
            "crashed with exit code 1, last words: no module named x"
        );
        assert!(shell("echo hello").unwrap_err().starts_with("answered something that is not an answer"));
        assert!(shell("true").unwrap_err().starts_with("answered something that is not an answer"));
        let mut hang = Command::new("/bin/sh");
        let error = run(hang.args(["-c", "sleep 1000"]), Duration::from_millis(200)).unwrap_err();
        assert_eq!(error, "did not answer within 0.2 s");
        let error = run(&mut Command::new("/nonexistent/python"), Duration::from_secs(1)).unwrap_err();
        assert!(error.contains("there is no /nonexistent/python"), "{error}");
    }

    #[test]
    fn the_cache_returns_only_what_was_asked() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { folder: Some(folder.path()) };
        let key = |text: &str| Cache::key(&Hash::of_bytes(b"env"), &text);
        let answer = Answer { version: "1".into(), ..Answer::default() };
        cache.put("a.json", key("x"), &answer).unwrap();
        assert_eq!(cache.get("a.json", &key("x")), Some(answer));
        assert_eq!(cache.get("a.json", &key("y")), None);
        std::fs::write(folder.path().join("a.json"), "{").unwrap();
        assert_eq!(cache.get("a.json", &key("x")), None);
    }
}
