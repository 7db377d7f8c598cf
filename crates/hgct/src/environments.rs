//! The agent's own table of environments: from these, by name, it starts workers.
//!
//! Written by `scripts/environments.py` into `.hgct/environments.toml`, or by hand. No command,
//! path or variable ever comes over the wire: an order names a row of this table.
//!
//! The worker without Python needs no row: where its program lies in `.hgct/bin` or beside `hgct`,
//! the table has one for it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use hgct_core::canonical::Hash;
use hgct_core::ids::EnvironmentId;
use hgct_core::suggest;
use serde::{Deserialize, Serialize};

use crate::vendors::{ENGINES, NATIVE};

/// The program of the worker without Python.
const NATIVE_PROGRAM: &str = "hgct-worker-burn";
/// Limits the threads of a software adapter (Mesa's lavapipe).
const NATIVE_THREADS: &str = "LP_NUM_THREADS";

/// Variables of our own process that others get; all else is the table's.
const INHERITED: [&str; 10] =
    ["PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"];

/// Mesa's layer that reorders adapters asks a desktop which one it uses; a worker names its own.
const NATIVE_VARIABLES: [(&str, &str); 1] = [("NODEVICE_SELECT", "1")];
/// Which drivers the worker without Python may load: what the Vulkan loader reads.
const LOADER: [&str; 6] = [
    "VK_DRIVER_FILES",
    "VK_ICD_FILENAMES",
    "VK_ADD_DRIVER_FILES",
    "VK_LOADER_DRIVERS_SELECT",
    "VK_LOADER_DRIVERS_DISABLE",
    "XDG_DATA_DIRS",
];

/// Result of this module.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with the table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// There is no table, and no worker that needs none.
    #[error(
        "{path}: there is no table of environments: run `python3 scripts/environments.py` first (or `make \
         vulkan`, for a worker without Python)"
    )]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The table cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It does not parse, or a value is not allowed.
    #[error(transparent)]
    Document(#[from] hgct_core::Error),
}

/// The table: a row a kind of engine and installation.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Environments {
    rows: Vec<Environment>,
}

/// One interpreter with its packages and variables, or the worker that needs none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Environment {
    /// Its name, which orders use.
    pub(crate) name: EnvironmentId,
    /// The engine in it.
    pub(crate) engine: String,
    /// The real interpreter, absolute; of the worker without Python its program.
    pub(crate) interpreter: PathBuf,
    /// Its version.
    #[serde(default)]
    pub(crate) python_version: String,
    /// The framework's name.
    #[serde(default)]
    pub(crate) framework: String,
    /// The framework's version, empty if it was never imported.
    #[serde(default)]
    pub(crate) framework_version: String,
    /// SHA-256 of the pinned requirements, hex.
    #[serde(default)]
    pub(crate) lock_hash: String,
    /// SHA-256 of the hgct wheel in it, hex; empty: none yet.
    #[serde(default)]
    pub(crate) wheel_hash: String,
    /// Variables that get the number of threads of a grant.
    #[serde(default)]
    pub(crate) thread_variables: Vec<String>,
    /// Libraries to load before the interpreter's own.
    #[serde(default)]
    pub(crate) preload: Vec<PathBuf>,
    /// Why it cannot be used.
    #[serde(default, skip_serializing)]
    pub(crate) unusable: Option<String>,
    /// Variables of every process in it.
    #[serde(default)]
    pub(crate) variables: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    environment: Vec<Environment>,
}

impl Environment {
    /// Hash of the whole record but `unusable`: interpreter, versions, lock, wheel, variables and
    /// preloads. Plans, profiles and checks name it.
    pub(crate) fn hash(&self) -> Hash {
        Hash::of(self)
    }

    /// Whether it is the worker without Python.
    pub(crate) fn is_native(&self) -> bool {
        self.engine == NATIVE
    }

    /// A worker in it, ready to start.
    pub(crate) fn worker(&self, overlay: &BTreeMap<String, String>, threads: u32) -> Command {
        let mut command = self.command(overlay, threads);
        if !self.is_native() {
            command.args(["-m", "hgct.worker"]);
        }
        command
    }

    /// Its interpreter, ready for arguments: nothing of our own process's variables but
    /// [`INHERITED`], then those of the record, `overlay`, the threads and the preloads.
    pub(crate) fn command(&self, overlay: &BTreeMap<String, String>, threads: u32) -> Command {
        let mut command = Command::new(&self.interpreter);
        // Not the current folder: what lies there must not stand in for a package.
        command.env_clear().current_dir("/");
        let loader: &[&str] = if self.is_native() { &LOADER } else { &[] };
        let inherited = INHERITED.iter().chain(loader);
        command.envs(inherited.filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.envs(&self.variables).envs(overlay);
        command.envs(self.thread_variables.iter().map(|name| (name, threads.to_string())));
        if !self.preload.is_empty() {
            let paths: Vec<_> = self.preload.iter().map(|path| path.as_os_str()).collect();
            command.env("LD_PRELOAD", paths.join(OsStr::new(":")));
        }
        command
    }
}

impl Environments {
    /// Reads and validates the table at `path`, and adds the worker without Python where it is
    /// installed and has no row.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let program = native_program(path.parent());
        let mut table = match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&path.display().to_string(), &text)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && program.is_some() => {
                Self::default()
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::Missing { path: path.to_owned() });
            }
            Err(source) => return Err(Error::Read { path: path.to_owned(), source }),
        };
        if let Some(program) = program.filter(|_| !table.rows.iter().any(Environment::is_native)) {
            table.rows.push(native(program)?);
        }
        Ok(table)
    }

    /// Parses and validates a table; `file` is only named in errors.
    pub(crate) fn parse(file: &str, text: &str) -> Result<Self> {
        let document: Document = suggest::parse_toml(file, text)?;
        let bad = |key: String, found: String, allowed: String| {
            Err(Error::from(hgct_core::Error::Value { file: file.into(), key, found, allowed }))
        };
        let mut names = BTreeSet::new();
        for row in &document.environment {
            let key = |field: &str| format!("environment.{field} of {}", row.name);
            if !names.insert(&row.name) {
                return bad("environment.name".into(), row.name.to_string(), "unique".into());
            }
            if !ENGINES.contains(&row.engine.as_str()) {
                let near = suggest::nearest(&row.engine, ENGINES);
                let hint = near.map_or_else(String::new, |near| format!(" (did you mean `{near}`?)"));
                let allowed = format!("one of {}{hint}", ENGINES.join(", "));
                return bad(key("engine"), format!("{:?}", row.engine), allowed);
            }
            if !row.interpreter.is_absolute() {
                let found = row.interpreter.display().to_string();
                return bad(key("interpreter"), found, "an absolute path".into());
            }
            let plain =
                |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            if let Some(name) = row.variables.keys().chain(&row.thread_variables).find(|name| !plain(name)) {
                return bad(key("variables"), format!("{name:?}"), "letters, digits and '_'".into());
            }
        }
        Ok(Self { rows: document.environment })
    }

    /// All rows, in the order of the table, which is also the order of preference where two
    /// environments drive one card.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Environment> {
        self.rows.iter()
    }

    /// Looks a row up.
    pub(crate) fn get(&self, name: &EnvironmentId) -> Option<&Environment> {
        self.rows.iter().find(|row| row.name == *name)
    }
}

/// Where the worker without Python is installed: under the table's folder, or beside this program.
fn native_program(folder: Option<&Path>) -> Option<PathBuf> {
    let here = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.to_owned()));
    let folders = folder.map(|folder| folder.join("bin")).into_iter().chain(here);
    // Absolute, as every program of a table: a worker starts elsewhere.
    folders.map(|folder| folder.join(NATIVE_PROGRAM)).find_map(|path| path.canonicalize().ok())
}

/// The row of the worker without Python. Its size and time stand for its content.
fn native(program: PathBuf) -> Result<Environment> {
    let about = program.metadata().map_err(|source| Error::Read { path: program.clone(), source })?;
    let since = about.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    Ok(Environment {
        name: EnvironmentId::new(NATIVE)?,
        engine: NATIVE.into(),
        interpreter: program,
        python_version: String::new(),
        framework: NATIVE.into(),
        framework_version: String::new(),
        lock_hash: format!("{}-{}", about.len(), since.map_or(0, |since| since.as_nanos())),
        wheel_hash: String::new(),
        thread_variables: vec![NATIVE_THREADS.into()],
        preload: Vec::new(),
        unusable: None,
        variables: NATIVE_VARIABLES.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = r#"
[[environment]]
name = "mlx"
engine = "mlx"
interpreter = "/env/mlx/bin/python"
python_version = "3.11.7"
framework = "mlx"
framework_version = "0.32.4"
lock_hash = "98aa"
wheel_hash = ""
thread_variables = ["OPENBLAS_NUM_THREADS"]
preload = ["/env/mlx/lib/libhgct_blas.so"]
[environment.variables]
OMP_WAIT_POLICY = "PASSIVE"

[[environment]]
name = "jax"
engine = "jax"
interpreter = "/env/jax/bin/python"
unusable = "no disk"
"#;

    #[test]
    fn reads_what_the_installer_writes() {
        let table = Environments::parse("environments.toml", TABLE).unwrap();
        let names: Vec<_> = table.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["mlx", "jax"]);
        let jax = table.get(&EnvironmentId::new("jax").unwrap()).unwrap();
        assert_eq!(jax.unusable.as_deref(), Some("no disk"));
    }

    #[test]
    fn the_hash_sees_what_changes_a_process_and_nothing_else() {
        let hash = |text: &str| Environments::parse("t", text).unwrap().rows[0].hash();
        let base = hash(TABLE);
        for (old, new) in [
            ("PASSIVE", "ACTIVE"),
            ("/env/mlx/bin", "/env/other/bin"),
            ("98aa", "98ab"),
            ("0.32.4", "0.32.5"),
            ("libhgct_blas", "libother"),
            ("wheel_hash = \"\"", "wheel_hash = \"ab\""),
        ] {
            assert_ne!(hash(&TABLE.replacen(old, new, 1)), base, "{old} does not count");
        }
        assert_eq!(
            hash(&TABLE.replace("[environment.variables]", "unusable = \"x\"\n[environment.variables]")),
            base
        );
    }

    #[test]
    fn a_command_has_the_variables_of_the_table_and_few_others() {
        let table = Environments::parse("t", TABLE).unwrap();
        let overlay = BTreeMap::from([("X".to_owned(), "1".to_owned())]);
        let command = table.rows[0].command(&overlay, 3);
        let of = |name: &str| {
            let value = command.get_envs().find(|(key, _)| *key == name).and_then(|(_, value)| value);
            value.and_then(OsStr::to_str).map(str::to_owned)
        };
        assert_eq!(of("OPENBLAS_NUM_THREADS").as_deref(), Some("3"));
        assert_eq!(of("LD_PRELOAD").as_deref(), Some("/env/mlx/lib/libhgct_blas.so"));
        assert_eq!((of("X").as_deref(), of("OMP_WAIT_POLICY").as_deref()), (Some("1"), Some("PASSIVE")));
        // Cargo sets this one for every test.
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some() && of("CARGO_MANIFEST_DIR").is_none());
    }

    #[test]
    fn the_worker_without_python_needs_no_row() {
        let folder = tempfile::tempdir().unwrap();
        let table = folder.path().join("environments.toml");
        std::fs::create_dir(folder.path().join("bin")).unwrap();
        let program = folder.path().join("bin").join(NATIVE_PROGRAM);
        std::fs::write(&program, "").unwrap();
        let alone = Environments::read(&table).unwrap();
        let names: Vec<_> = alone.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["burn"]);
        let command = alone.rows[0].worker(&BTreeMap::new(), 2);
        assert_eq!(command.get_args().count(), 0);
        assert!(command.get_program() == program.canonicalize().unwrap());
        // Another build of it is another environment.
        std::fs::write(&program, "x").unwrap();
        assert_ne!(Environments::read(&table).unwrap().rows[0].hash(), alone.rows[0].hash());
        std::fs::write(&table, TABLE).unwrap();
        assert_eq!(Environments::read(&table).unwrap().rows.len(), 3);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| Environments::parse("t.toml", text).unwrap_err().to_string();
        assert!(error(&TABLE.replace("engine = \"jax\"", "engine = \"jx\"")).contains("did you mean `jax`"));
        assert!(error(&TABLE.replace("preload", "prelod")).contains("did you mean `preload`"));
        assert!(error(&TABLE.replace("/env/jax", "env/jax")).contains("an absolute path"));
        assert!(error(&TABLE.replace("name = \"jax\"", "name = \"mlx\"")).contains("unique"));
        assert!(error(&TABLE.replace("OMP_WAIT_POLICY", "\"A=B\"")).contains("letters, digits"));
        let missing = Environments::read(Path::new("/nonexistent/environments.toml")).unwrap_err();
        assert!(missing.to_string().contains("scripts/environments.py"), "{missing}");
    }
}
