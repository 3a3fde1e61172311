//! Facts on standard output: for people, or as JSON.

use std::fmt;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use block_io::Shown;
use clap::ValueEnum;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::error::CowError;

/// How facts are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON value.
    Json,
}

/// The option that every command with facts has.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct OutputArgs {
    /// How the facts are printed
    #[arg(
        id = "output",
        long = "output",
        value_name = "FORMAT",
        default_value = "human",
        value_enum
    )]
    pub format: OutputFormat,
}

impl OutputArgs {
    /// Prints `facts` as JSON, or what `human` makes of them.
    pub fn print<T: Serialize>(
        self,
        facts: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), CowError> {
        let text = match self.format {
            OutputFormat::Human => human(facts),
            OutputFormat::Json => json(facts).map_err(|err| CowError::Output(err.into()))?,
        };
        print(&text)
    }
}

fn json<T: Serialize>(facts: &T) -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string_pretty(facts)?;
    text.push('\n');
    Ok(text)
}

/// Writes `text` to standard output as it is.
pub fn print(text: &str) -> Result<(), CowError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CowError::Output)
}

/// A file name among facts, to be flattened: text under its key. A name that is not UTF-8, which
/// JSON cannot have, loses bytes there, and is under `KEY-hex` as well, all of it.
pub struct Name {
    key: &'static str,
    pub path: PathBuf,
}

impl Name {
    pub fn new(key: &'static str, path: impl Into<PathBuf>) -> Self {
        Name { key, path: path.into() }
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let name = self.path.as_os_str();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry(self.key, &name.to_string_lossy())?;
        if name.to_str().is_none() {
            map.serialize_entry(&format!("{}-hex", self.key), &hex(name.as_bytes()))?;
        }
        map.end()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.shown().fmt(f)
    }
}

/// Two digits for each byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
