"""What FlowKV measures about itself. Each benchmark is a module that writes JSON and says what it ran on."""
