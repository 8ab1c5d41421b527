"""What every kind of virtual machine shares: kernel, image disk, configuration, tap, jail, the guest's channel, the lifecycle."""
