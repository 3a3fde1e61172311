//! Facts on standard output: for people, or as JSON.

use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;

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
